"""What `jsae-bench` is made of: shapes, contestants, clocks, memory, growth, and the training loop's time."""
