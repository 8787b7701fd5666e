"""What is next: Optuna proposes, the race puts out, the searcher decides."""
