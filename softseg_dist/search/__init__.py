"""Many fits: Optuna proposes, Ray Tune runs, the ledger remembers, MLflow shows."""
