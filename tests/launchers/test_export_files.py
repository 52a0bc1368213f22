"""The files that a merge reads and writes, what it refuses, and the command line of export.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from launchers import export
from reflora_dist.export import merge
from reflora_dist.export.merge import merge_adapter
from reflora_dist.files import output_folder
from reflora_dist.files.stored_weights import Entry, write_file
from tests.support.merging import MERGE_CASES, assert_same_bits, save_adapter, save_base


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.int64]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_streamed_is_what_the_library_reads(
    shapes: list[tuple[list[int], torch.dtype]], tmp_path: Path
) -> None:
    """Any mixture of shapes and dtypes, scalars and empty tensors too; each is aligned to its elements."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"weight.{number}": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for number, (shape, dtype) in enumerate(shapes)
    }
    entries = [
        Entry(key=key, shape=tuple(tensor.shape), dtype=tensor.dtype, load=lambda tensor=tensor: tensor)  # type: ignore[misc]
        for key, tensor in tensors.items()
    ]
    done: list[int] = []
    write_file(tmp_path / "streamed.safetensors", entries, {"format": "pt"}, done.append)
    assert_same_bits(load_file(tmp_path / "streamed.safetensors"), tensors)
    assert sum(done) == sum(tensor.nbytes for tensor in tensors.values())
    content = (tmp_path / "streamed.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    assert start % 8 == 0 and header.pop("__metadata__")["format"] == "pt"
    for key, place in header.items():
        assert place["data_offsets"][0] % tensors[key].itemsize == 0, "readers that map the file need this"


@pytest.fixture(scope="module")
def base_and_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    save_base("llama", False, folder / "base")
    save_adapter(LlamaForCausalLM.from_pretrained(folder / "base"), MERGE_CASES["linear"][2], folder / "adapter")
    return folder


def test_tokenizer_and_other_files_come_along(base_and_adapter: Path, tmp_path: Path) -> None:
    """The base's configuration, generation settings and tokenizer; of the tokenizer the adapter's where it has one."""
    folder = shutil.copytree(base_and_adapter, tmp_path / "both")
    (folder / "base" / "tokenizer.json").write_text('{"of": "base"}')
    (folder / "base" / "vocab.txt").write_text("base")
    (folder / "base" / "pytorch_model.bin").write_text("the same weights in another format")
    (folder / "adapter" / "tokenizer.json").write_text('{"of": "adapter"}')
    (folder / "adapter" / "trainer_state.json").write_text("{}")
    merge_adapter(folder / "adapter", folder / "merged", base=str(folder / "base"))
    assert (folder / "merged" / "tokenizer.json").read_text() == '{"of": "adapter"}'
    assert (folder / "merged" / "vocab.txt").read_text() == "base"
    for file in ("config.json", "generation_config.json"):
        assert (folder / "merged" / file).read_bytes() == (folder / "base" / file).read_bytes()
    present = {path.name for path in (folder / "merged").iterdir()}
    assert not present & {"pytorch_model.bin", "trainer_state.json", "adapter_config.json", "adapter_model.safetensors"}


def _shard(folder: Path, checkpoint: Path) -> None:
    """An adapter as FSDP's checkpoints hold it, written by one process."""
    state = checkpoint / "pytorch_model_fsdp_0"
    dcp.save(load_file(folder / "adapter_model.safetensors"), checkpoint_id=state, no_dist=True)


@pytest.mark.parametrize("place", ["run", "run/checkpoint-3"])
@pytest.mark.parametrize("adapter", ["run/checkpoint-3", "run/checkpoint-3/pytorch_model_fsdp_0"])
def test_a_sharded_checkpoint_brings_its_tokenizer(
    place: str, adapter: str, base_and_adapter: Path, tmp_path: Path
) -> None:
    """It is in the checkpoint, or beside the configuration in the run's output folder."""
    _shard(base_and_adapter / "adapter", tmp_path / "run" / "checkpoint-3")
    shutil.copy(base_and_adapter / "adapter" / "adapter_config.json", tmp_path / "run")
    (tmp_path / "run" / "tokenizer_config.json").write_text('{"of": "run"}')
    for file in ("tokenizer_config.json", "added_tokens.json"):
        (tmp_path / place / file).write_text(json.dumps({"of": place}))
    options = ["--adapter", str(tmp_path / adapter), "--adapter_config", str(tmp_path / "run"), "--merge"]
    export.main([*options, "--output_dir", str(tmp_path / "merged")])
    for file in ("tokenizer_config.json", "added_tokens.json"):
        assert json.loads((tmp_path / "merged" / file).read_text()) == {"of": place}


def _no_space(folder: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: usage)


def _second_file(folder: Path) -> Path:
    return next((folder / "base").glob("model-00002-of-*.safetensors"))


def _truncated_base(folder: Path, monkeypatch: Any) -> None:
    path = _second_file(folder)
    path.write_bytes(path.read_bytes()[:-100])


def _missing_file(folder: Path, monkeypatch: Any) -> None:
    _second_file(folder).unlink()


def _only_bin(folder: Path, monkeypatch: Any) -> None:
    for path in (folder / "base").glob("*.safetensors*"):
        path.unlink()
    (folder / "base" / "pytorch_model.bin").write_text("")


def _set_config(part: str, file: str, **changes: Any) -> Any:
    def change(folder: Path, monkeypatch: Any) -> None:
        path = folder / part / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def _lacks_a_factor(folder: Path, monkeypatch: Any) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(sorted(tensors))))
    save_file(tensors, path)


def _not_finite(folder: Path, monkeypatch: Any) -> None:
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).fill_(torch.inf)
    save_file(tensors, path)


def _truncate(file: str) -> Any:
    def change(folder: Path, monkeypatch: Any) -> None:
        path = folder / "adapter" / file
        path.write_bytes(path.read_bytes()[:-100])

    return change


def _remove(file: str) -> Any:
    return lambda folder, monkeypatch: (folder / "adapter" / file).unlink()


def _no_object(folder: Path, monkeypatch: Any) -> None:
    (folder / "adapter" / "adapter_config.json").write_text("[]")


def _renamed_weights(folder: Path, monkeypatch: Any) -> None:
    name = next(
        path for path in (folder / "base").glob("*.safetensors") if any("up_proj" in key for key in load_file(path))
    )
    save_file({key.replace("up_proj", "rising"): tensor for key, tensor in load_file(name).items()}, name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_space, "has 0.00 GB free: name another folder"),
        (_truncated_base, r"model-00002-of-\d+.safetensors cannot be read"),
        (_missing_file, r"model-00002-of-\d+.safetensors is missing"),
        (_only_bin, r"it has pytorch_model.bin; .*save_pretrained"),
        (_set_config("base", "config.json", quantization_config={"quant_method": "bitsandbytes"}), "is quantized"),
        (_set_config("base", "config.json", hidden_size=64), "does not fit the base"),
        (_set_config("adapter", "adapter_config.json", r=5), "does not fit the base"),
        (_set_config("adapter", "adapter_config.json", target_modules=["nothing"]), "does not fit the base"),
        (_set_config("adapter", "adapter_config.json", init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        (_set_config("adapter", "adapter_config.json", peft_type="IA3"), "IA3"),
        (_set_config("adapter", "adapter_config.json", peft_type="NO_SUCH"), "NO_SUCH"),
        (_remove("adapter_config.json"), "it has no adapter_config.json"),
        (_truncate("adapter_config.json"), r"adapter_config.json cannot be read \(JSONDecodeError"),
        (_no_object, r"adapter_config.json holds \[\] where a JSON object is wanted"),
        (_remove("adapter_model.safetensors"), "adapter_model.safetensors is missing"),
        (_truncate("adapter_model.safetensors"), r"adapter_model.safetensors cannot be read \(SafetensorError"),
        (_lacks_a_factor, "lacks .*lora_A"),
        (_not_finite, "is not finite after the merge"),
        (_renamed_weights, "up_proj.weight is adapted, but"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_leaves_nothing(
    damage: Any, message: str, base_and_adapter: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """The error names what is wrong; beside base and adapter there is no file, not even a temporary one."""
    folder = shutil.copytree(base_and_adapter, tmp_path / "both")
    damage(folder, monkeypatch)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        merge_adapter(folder / "adapter", folder / "merged", base=str(folder / "base"))
    assert sorted(path.name for path in folder.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_what_is_broken_beside_shards_is_named(file: str, base_and_adapter: Path, tmp_path: Path) -> None:
    """The configuration and the frozen factors come from files beside the shards."""
    folder = shutil.copytree(base_and_adapter / "adapter", tmp_path / "run")
    _shard(folder, folder)
    (folder / file).write_text("{")
    with pytest.raises(SystemExit, match=f"run/{file} cannot be read"):
        export.main(["--adapter", str(folder), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_folder_may_be_a_link(exists: bool, base_and_adapter: Path, tmp_path: Path) -> None:
    """The model goes where it leads, also if nothing is there yet."""
    if exists:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    merge_adapter(base_and_adapter / "adapter", tmp_path / "link", base=str(base_and_adapter / "base"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "config.json").is_file()


def test_a_mount_point_is_refused_at_once(base_and_adapter: Path, tmp_path: Path) -> None:
    """Nothing can be renamed onto it, which would show only when all is written; behind a link neither."""
    (tmp_path / "link").symlink_to("/")
    for target in (Path("/"), tmp_path / "link"):
        with pytest.raises(ValueError, match=f"{target} is a mount point.*: name a folder inside it"):
            merge_adapter(base_and_adapter / "adapter", target, base=str(base_and_adapter / "base"))


def test_a_merge_that_is_interrupted_leaves_nothing(base_and_adapter: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Not a folder that looks like a model and lacks its last files."""
    written: list[Path] = []

    def interrupted(path: Path, *arguments: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        write_file(path, *arguments)

    monkeypatch.setattr(merge, "write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(base_and_adapter / "adapter", tmp_path / "merged", base=str(base_and_adapter / "base"))
    assert len(written) == 3 and not list(tmp_path.iterdir())


# --- the command line ---


def test_the_command_merges_into_the_base_that_the_adapter_names(
    base_and_adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    """Without --model the base is the one in adapter_config.json; an output that exists is not touched."""
    arguments = ["--adapter", str(base_and_adapter / "adapter"), "--output_dir", str(tmp_path / "merged"), "--merge"]
    export.main([*arguments, "--model_dtype", "bfloat16"])
    assert "merged model" in capsys.readouterr().out
    assert LlamaForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    with pytest.raises(SystemExit, match="is not empty"):
        export.main(arguments)
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "is in PEFT's format already: add --merge"),
        (["--model", "base"], "model='base' means nothing without --merge"),
        (["--model_dtype", "float16"], "model_dtype='float16' means nothing without --merge"),
        (["--merge", "--adapter_name", "foo"], "adapter_name='foo' means nothing here: .* in PEFT's format"),
        (["--merge", "--adapter_config", "nosuch"], "adapter_config='nosuch' means nothing here: .* in PEFT's format"),
        (["--merge", "--model", "no/such/model"], "no/such/model' cannot be loaded: no such file or folder"),
        (["--adapter", "nowhere"], "holds neither an adapter_config.json nor a sharded state"),
    ],
)
def test_mistakes_end_in_one_line(arguments: list[str], message: str, base_and_adapter: Path, tmp_path: Path) -> None:
    """What a user can mend is told without a traceback, and before anything is written."""
    given = ["--adapter", str(base_and_adapter / "adapter"), "--output_dir", str(tmp_path / "out"), *arguments]
    with pytest.raises(SystemExit, match=message):
        export.main(given)
    assert not list(tmp_path.iterdir())
