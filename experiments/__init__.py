"""Studies: one module each, with Config, load, and run(config, data, mesh) -> Table."""
