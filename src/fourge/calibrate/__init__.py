"""What the data says: records become token sequences, and sequences become statistics."""
