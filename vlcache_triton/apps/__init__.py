"""What is built on the library: commands, evaluation, pictures, and the embedded model."""
