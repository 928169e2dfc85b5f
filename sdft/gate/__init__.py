"""Whether a stage is accepted, by what it has cost of the old; and the history of both kinds."""
