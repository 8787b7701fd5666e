"""What MLflow is sent."""
