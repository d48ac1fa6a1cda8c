"""The tiny Phi-3-V checkpoint, the script that pretrains it, and the generators of its sample data."""
