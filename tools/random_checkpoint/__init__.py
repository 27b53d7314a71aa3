"""The parts of `make_checkpoint.py`: shapes, a tokenizer made by program, layers and routing."""
