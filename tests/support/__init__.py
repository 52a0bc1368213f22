"""What tests share. No test lives here, and no test module imports another."""
