"""Moving experts between disk, host memory and device, and deciding which to keep."""
