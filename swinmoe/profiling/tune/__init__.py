"""Settings found by measuring: capacity factors for a trained model, and how tokens travel on a machine."""
