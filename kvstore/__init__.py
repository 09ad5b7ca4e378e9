"""The pure core: what is stored where, who may read it, who may go. No I/O, no clock, no threads."""
