"""Everything that several processes do together around the model."""
