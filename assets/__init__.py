"""The embedded tiny Phi-3-V checkpoint, the script that pretrains it, and what draws its sample data."""
