"""How two processes share the tests (``-n 2``), and a local S3 server for all that need one."""

import signal

import pytest

RAY = (
    "job/",
    "runtime/",
    "serve/",
    "data/test_ingest.py",
    "test_audit_export.py",
    "test_cli.py",
    "test_cli_judge.py",
    "test_evaluate.py",
    "test_examples.py",
    "test_plan.py",
    "test_rollout_",
)
"""Tests that may start a cluster: one at a time on a machine."""

WITHOUT_RAY = (
    "runtime/test_attempts.py",
    "runtime/test_audit_log.py",
    "runtime/test_bucket.py",
    "runtime/test_judges.py",
    "runtime/test_measure.py",
    "runtime/test_parts.py",
    "runtime/test_registry.py",
    "runtime/test_stale.py",
    "runtime/test_triaged.py",
    "runtime/test_webhook.py",
    "serve/test_chain.py",
    "serve/test_engines.py",
    "serve/test_follow_parts.py",
    "serve/test_pure_parts.py",
    "serve/test_records.py",
    "serve/test_requests.py",
    "serve/test_turn.py",
    "serve/test_usage.py",
    "test_rollout_watch.py",
)
"""Files among those that start none."""


def pytest_configure():
    # A shell's background job ignores SIGINT, and so would each command that a test starts and interrupts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Ray's tests go to one process, one after the other; the other files to the other."""
    from xdist.scheduler import LoadScopeScheduling

    class RayBesideTheOthers(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0].removeprefix("tests/")
            return "ray" if file.startswith(RAY) and file not in WITHOUT_RAY else file

    return RayBesideTheOthers(config, log)


@pytest.fixture(scope="session")
def s3_server():
    """The server's address."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture(scope="module")
def s3_environment(s3_server):
    """Point the usual AWS variables at it."""
    settings = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield settings
