"""What has happened, on disk: ledger, changes of a study, status, remote copies."""
