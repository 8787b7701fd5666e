#!/bin/sh
# Start MLflow with logins. All settings come from the environment; without one of them it ends with an error, so that there
# is no server without a password.
set -eu
: "${MLFLOW_DATABASE:?postgresql://user:password@host:5432/database, for runs and for logins}"
: "${MLFLOW_ARTIFACTS:?where artifacts go, such as s3://bucket/mlflow or gs://bucket/mlflow}"
: "${MLFLOW_ALLOWED_HOSTS:?names by which the server is called, such as localhost:5000,mlflow:5000}"
: "${MLFLOW_FLASK_SERVER_SECRET_KEY:?a long random text, the same for all copies of the server}"
: "${MLFLOW_AUTH_ADMIN_PASSWORD:?the first password of the user admin}"

# The file holds the database's password: only this user may read it, and it is gone with the container.
umask 077
settings=${TMPDIR:-/tmp}/basic_auth.ini
cat > "$settings" << INI
[mlflow]
default_permission = NO_PERMISSIONS
database_uri = $MLFLOW_DATABASE
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
INI
export MLFLOW_AUTH_CONFIG_PATH="$settings"
exec mlflow server --app-name basic-auth --host 0.0.0.0 --port 5000 --allowed-hosts "$MLFLOW_ALLOWED_HOSTS" \
    --backend-store-uri "$MLFLOW_DATABASE" --artifacts-destination "$MLFLOW_ARTIFACTS" --workers "${MLFLOW_WORKERS:-2}"
