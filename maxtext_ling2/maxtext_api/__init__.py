"""MaxText used as a library by our own commands: settings, recipes, meshes, models and the engine. No patches here."""
