"""Export of trained models to formats that other runtimes read, and the proof that the file is right."""
