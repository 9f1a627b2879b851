"""What a configuration will take on a mesh of accelerators, without one: memory, operations, bytes moved, time."""
