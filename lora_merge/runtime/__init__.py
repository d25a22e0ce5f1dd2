"""The process and its machine: cores and memory, memory shortage, interrupts, standard streams, clocks."""
