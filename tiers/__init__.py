"""Where bytes live: one module per tier behind one small interface."""
