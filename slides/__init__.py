"""Reading and writing what people have: slides, encoders, official samples, bags."""
