"""Create or update an MLflow account that may manage all experiments and registered models.

    kubectl -n NAMESPACE exec -i deployment/mlflow -- python /etc/mlflow/account.py NAME < PASSWORD

PASSWORD is a file. An account may manage the experiments and models that it creates; this script
also grants it those that exist. Run the script again for those created later by other accounts.
"""

import os
import sys
from collections.abc import Callable, Iterator

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException, RestException
from mlflow.server.auth.client import AuthServiceClient


def main() -> None:
    """Read the name from the command line and the password from standard input.

    Raises SystemExit for invalid input.
    """
    if len(sys.argv) != 2:
        raise SystemExit("usage: account.py NAME, with the password on standard input")
    name, password = sys.argv[1], sys.stdin.readline().rstrip("\n")
    if len(password) < 12:
        raise SystemExit("the password on standard input has fewer than 12 characters")
    # the clients read these variables; the server's container has the administrator's password
    os.environ.setdefault("MLFLOW_TRACKING_USERNAME", "admin")
    os.environ.setdefault("MLFLOW_TRACKING_PASSWORD", os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"])
    address = os.environ.get("MLFLOW_TRACKING_URI", "http://localhost:5000")
    accounts, client = AuthServiceClient(address), MlflowClient(address)
    if name == os.environ["MLFLOW_TRACKING_USERNAME"]:
        raise SystemExit(f"{name} is the administrator: pass the name of another account")
    try:
        accounts.get_user(name)
    except RestException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        accounts.create_user(name, password)
    else:
        accounts.update_user_password(name, password)
    granted = 0
    experiments, models = client.search_experiments, client.search_registered_models
    resources = [("experiment", experiment.experiment_id) for experiment in pages(experiments)]
    resources += [("registered_model", model.name) for model in pages(models)]
    for kind, key in resources:
        try:
            accounts.grant_user_permission(name, kind, key, "MANAGE")
        except RestException as error:  # the account created it, or this script ran before
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        granted += 1
    print(f"account {name}: password set, may manage {granted} existing experiments and models")


def pages(search: Callable) -> Iterator:
    """Yield all results of a search method of MlflowClient."""
    token = None
    while True:
        found = search(page_token=token)
        yield from found
        token = found.token
        if not token:
            return


if __name__ == "__main__":
    try:
        main()
    except MlflowException as error:
        raise SystemExit(f"MLflow rejected the request: {error}") from None
