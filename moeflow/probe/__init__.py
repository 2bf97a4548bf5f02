"""What this machine is and how fast its memory, link and disk are, as a hardware profile."""
