"""What a run will need, told before it begins: memory, disk, sizes to the byte, and time."""
