"""Private plumbing shared by every package: errors, checks, dispatch, specs, registries, settings, lazy imports."""
