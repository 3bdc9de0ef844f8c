"""The device's side: local training and inference."""
