"""Teachers: frozen models and what was kept of them; tuned lenses."""
