"""From files or a model to a report or a track: what is measured, in which order, and what is written of it."""
