"""launch: starts a server of several replicas on Ray, and stops it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..options import ServeOptions
from .options import ClusterOptions

try:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    import ray
    from ray import cloudpickle, serve
except ImportError as error:
    raise ConfigError("several replicas need Ray Serve; install it with pip install 'molora[cluster]'") from error

from . import balance
from .affinity import AdapterAffinity
from .ingress import Ingress
from .replica import EngineReplica
from .scaling import QueuedTokens

logger = logging.getLogger("molora.serve")
NAMESPACE = "molora"
ENGINE, INGRESS = "Engine", "Ingress"
OBJECTS = 100 << 20  # bytes of Ray's object store: requests and chunks are small
PATHS = ("model", "hub", "tenants", "database", "manifest")


class Cluster:
    """A server that runs; a context, which stops it at the end.

    Attributes:
        url: where it answers.
        options: what it was started with.
    """

    def __init__(self, url: str, options: ServeOptions, cluster: ClusterOptions, owns_ray: bool) -> None:
        self.url, self.options, self._cluster, self._owns_ray = url, options, cluster, owns_ray
        self._is_open = True

    @property
    def engines(self) -> Any:
        """The handle of the engine deployment."""
        return serve.get_deployment_handle(ENGINE, self._cluster.app)

    def states(self) -> list[dict[str, Any]]:
        """Return how things stand on every replica; see `EngineReplica.state`."""
        answers = self.engines.broadcast("state").results(timeout_s=30.0, return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    def close(self) -> None:
        """Let running answers end, for at most the time of the option `drain`; then stop."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            serve.delete(self._cluster.app)
            with contextlib.suppress(ValueError):  # it is not there
                ray.kill(ray.get_actor(_balance_name(self._cluster.app), NAMESPACE))
        finally:
            if self._owns_ray:
                serve.shutdown()
                ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def launch(options: ServeOptions) -> Cluster:
    """Start a server of `options.replicas` replicas, and return when it answers.

    Raises:
        ConfigError: the options contradict each other, the port is taken, or no replica gets ready.
    """
    told = ClusterOptions.of(options.cluster, options.replicas)
    if told.ingresses > 1 and options.feedback:
        raise ConfigError("feedback needs one ingress, since bandits learn where answers are given; set ingresses: 1")
    shared = everywhere(options)
    port = _free(options.host, options.port)
    owns_ray = _init(told, options)
    logging.getLogger("ray.serve").setLevel(_log_level(options))
    cluster = Cluster(_url(options.host, port), options, told, owns_ray)
    try:
        serve.start(
            proxy_location="HeadOnly" if owns_ray else "EveryNode",
            http_options={"host": options.host, "port": port},
            logging_config={"enable_access_log": options.log_level == "debug", "log_level": _log_level(options)},
        )
        serve.run(application(options, shared), name=told.app, route_prefix="/")
    except BaseException as error:
        cluster.close()
        if isinstance(error, RuntimeError):  # Ray Serve's word for replicas that do not start
            raise ConfigError(f"the cluster did not start: {error}") from error
        raise
    return cluster


def application(options: ServeOptions, shared: dict[str, Any]) -> Any:
    """Return what Ray Serve runs; `shared` are the options for its processes, of `everywhere`."""
    told = ClusterOptions.of(options.cluster, options.replicas)
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if told.max_replicas is not None and told.max_replicas > options.replicas:
        scale = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": told.max_replicas,
                "upscale_delay_s": told.upscale_delay,
                "downscale_delay_s": told.downscale_delay,
                "look_back_period_s": 11.0,  # Ray wants more than 10
                "policy": {"policy_function": QueuedTokens, "policy_kwargs": {"target": told.target_tokens}},
            }
        }
    most = options.max_batch + options.max_waiting
    stopping = {"graceful_shutdown_timeout_s": options.drain + 10.0, "graceful_shutdown_wait_loop_s": 0.5}
    health = {"health_check_period_s": told.health, "health_check_timeout_s": max(30.0, 3 * told.health)}
    log = {"logging_config": {"enable_access_log": options.log_level == "debug", "log_level": _log_level(options)}}
    engines = (
        serve.deployment(EngineReplica)
        .options(
            name=ENGINE,
            # an engine that is full says so itself, in the words of a single server
            max_ongoing_requests=most + 16,
            ray_actor_options={"num_cpus": told.cpus, "num_gpus": told.gpus},
            request_router_config={
                "request_router_class": AdapterAffinity,
                "request_router_kwargs": {"spill": options.max_batch if told.spill is None else told.spill},
            },
            **scale,
            **stopping,
            **health,
            **log,
        )
        .bind(shared, None, _balance(told.app))
    )
    every = most * (told.max_replicas or options.replicas)
    return (
        serve.deployment(serve.ingress()(Ingress))
        .options(
            name=INGRESS,
            num_replicas=told.ingresses,
            max_ongoing_requests=every + 256,  # and those that are refused, and lists, and metrics
            ray_actor_options={"num_cpus": 0},
            **stopping,
            **health,
            **log,
        )
        .bind(shared, engines)
    )


def _balance_name(app: str) -> str:
    return f"{app}-balance"


def _balance(app: str) -> Any:
    """Return the actor that adds up what tenants get; Ray starts it again when it is lost."""
    cloudpickle.register_pickle_by_value(balance)  # so that its process needs nothing but Ray, and is quick
    try:
        return (
            ray.remote(balance.Balance)
            .options(
                name=_balance_name(app),
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                max_restarts=-1,
                max_task_retries=0,
                num_cpus=0,
            )
            .remote()
        )
    finally:
        cloudpickle.unregister_pickle_by_value(balance)


def _init(told: ClusterOptions, options: ServeOptions) -> bool:
    """Join a Ray cluster, or start one on this machine; returns whether it was started."""
    common = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": _log_level(options)}
    if ray.is_initialized():
        return False
    if told.address is not None:
        ray.init(address=told.address, **common)
        return False
    replicas = told.max_replicas or options.replicas
    os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", str(told.interval))
    with _local():
        ray.init(
            # one for each of the processes beside the replicas: that many may start at the same time
            num_cpus=math.ceil(replicas * told.cpus) + 3,
            num_gpus=math.ceil(replicas * told.gpus) or None,
            include_dashboard=False,
            object_store_memory=OBJECTS,
            _node_ip_address="127.0.0.1",
            **common,
        )
    if ray.util.get_node_ip_address() != "127.0.0.1":
        logger.warning("Ray listens on all addresses of this machine; keep its ports from others")
    return True


@contextlib.contextmanager
def _local() -> Iterator[None]:
    """Let the Ray that is started inside listen on 127.0.0.1 alone, as it does where it expects no other machines."""
    from ray._private import ray_constants

    name = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # for what it starts, and for this process
    try:
        yield
    finally:
        os.environ.pop(name)
        if before[0] is not None:
            os.environ[name] = before[0]
        ray_constants.ENABLE_RAY_CLUSTER = before[1]


def everywhere(options: ServeOptions) -> dict[str, Any]:
    """Return options whose paths mean the same in every process."""
    told = options.to_dict()
    for name in PATHS:
        value = told[name]
        if isinstance(value, str) and "://" not in value and (name != "model" or Path(value).expanduser().exists()):
            told[name] = os.path.abspath(Path(value).expanduser())
    for selector in told["selectors"].values():
        if "folder" in selector:
            selector["folder"] = os.path.abspath(Path(selector["folder"]).expanduser())
    return told


def _free(host: str, port: int) -> int:
    """Return a port that nobody listens on: the given one, or any for 0."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port, or 0") from error
        return probe.getsockname()[1]


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _log_level(options: ServeOptions) -> str:
    # what Ray calls info is of no use to who runs a server
    return "DEBUG" if options.log_level == "debug" else "WARNING"
