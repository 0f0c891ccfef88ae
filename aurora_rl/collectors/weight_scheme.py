"""TorchRL's weight-sync scheme over the versioned weights of `weight_sync`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import zmq
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.weight_update import TransportBackend, WeightStrategy, WeightSyncScheme
from torchrl.weight_update.weight_sync_schemes import register_weight_sync_backend

from aurora_rl.collectors.codec import Key, checksum, leaves
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver

__all__ = ["ZMQWeightSyncScheme"]

logger = logging.getLogger(__name__)


class _PublisherTransport:
    """TorchRL's transport protocol over a `WeightPublisher`; publishing never waits for an engine."""

    def __init__(self, publisher: WeightPublisher, key_filter: Callable[[Key], bool] | None) -> None:
        self._publisher = publisher
        self._key_filter = key_filter

    def setup_connection_and_weights_on_sender(self) -> None:
        """Nothing to do: engines come when they come."""

    def send_weights(self, weights: TensorDictBase | dict[str, Tensor] | None) -> None:
        """Publish under the next version.

        Args:
            weights: as `WeightSyncScheme.prepare_weights` returns them: nested by module path, or a state dict.

        Raises:
            ValueError: if there is nothing to publish.
        """
        if isinstance(weights, dict):
            weights = TensorDict(weights, batch_size=[]).unflatten_keys(".")
        selected = {} if weights is None else _select(weights, self._key_filter)
        if not selected:  # TorchRL makes an empty TensorDict of a missing policy
            raise ValueError(
                "there are no weights to publish: the context has no policy, or key_filter excludes them all"
            )
        self._publisher.publish(self._publisher.next_version, selected)

    def receive_weights(self, timeout: float | None = None, **_: Any) -> None:
        """A learner receives none."""


class _ReceiverTransport:
    """TorchRL's transport protocol over a `WeightReceiver`."""

    def __init__(self, receiver: WeightReceiver) -> None:
        self._receiver = receiver

    def setup_connection_and_weights_on_receiver(self, **_: Any) -> None:
        """Nothing to do: the weights come when the learner has some."""

    def send_weights(self, weights: Any) -> None:
        """An engine sends none."""

    def receive_weights(
        self,
        timeout: float | None = None,
        *,
        weights: Any = None,
        model: Any = None,
        strategy: WeightStrategy | None = None,
    ) -> TensorDictBase | None:
        """Install the newest weights in ``model``, in place, and acknowledge what it holds then.

        Args:
            timeout: seconds to wait for weights; None: for ever.
            weights: unused; a buffer that other transports receive into.
            model: has at least the received keys, in the same shapes.
            strategy: installs them.

        Returns:
            The weights, or None if none came in time or the model rejected them.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while (latest := self._receiver.latest()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                return None
            time.sleep(0.005)
        version, received = latest
        assert strategy is not None
        start = time.perf_counter()
        try:
            strategy.apply_weights(model, received)
        except (KeyError, RuntimeError, ValueError) as error:  # KeyError: how WeightStrategy reports keys and shapes
            logger.warning("version %d is not installed: %s", version, error)
            self._receiver.reject(version, f"{type(error).__name__} while loading")
            return None
        swap_ms = 1000 * (time.perf_counter() - start)
        held = strategy.extract_weights(model)
        assert isinstance(held, TensorDictBase)
        self._receiver.acknowledge(version, checksum({key: held[key] for key in received.keys(True, True)}), swap_ms)
        return received


def _select(weights: TensorDictBase, key_filter: Callable[[Key], bool] | None) -> dict[str | Key, Tensor]:
    return {key: value for key, value in leaves(weights) if key_filter is None or key_filter(key)}


@register_weight_sync_backend("zmq")
class ZMQWeightSyncScheme(WeightSyncScheme):
    """TorchRL's weight-sync scheme over `WeightPublisher` and `WeightReceiver`.

    On a learner, give it to a `ZMQCollector`; `update_policy_weights_` then publishes the policy under the next version
    and returns at once (``scheme.publisher.wait_ack`` waits). On an engine that TorchRL drives, ``init_on_receiver``
    with a model, ``connect`` and ``receive`` install the newest weights. The base class keeps weak references only, so
    hold the model.

    Args:
        address: the learner's; bound by the sender, connected to by the receiver.
        handshake: of this side.
        key_filter: which parameters to publish, by their path in the module, for example ``("head", "weight")``.
            Leave out what is tied to, or frozen from, the target. None: all.
        context: to share; needed for ``inproc://`` only.

    >>> from torchrl.weight_update import WeightSyncScheme
    >>> handshake = Handshake(1, "target", "", (1,), "", "eagle3")
    >>> type(WeightSyncScheme.from_backend("zmq", address="tcp://127.0.0.1:*", handshake=handshake)).__name__
    'ZMQWeightSyncScheme'
    """

    def __init__(
        self,
        address: str,
        *,
        handshake: Handshake,
        key_filter: Callable[[Key], bool] | None = None,
        context: zmq.Context | None = None,
    ) -> None:
        super().__init__(strategy="tensordict")
        self._address = address
        self._handshake = handshake
        self._key_filter = key_filter
        self._context = context
        self.publisher: WeightPublisher | None = None
        self.receiver: WeightReceiver | None = None

    def create_transport(self, **kwargs: Any) -> TransportBackend:
        """A transport over the publisher or the receiver, whichever this side has."""
        if self.publisher is not None:
            return _PublisherTransport(self.publisher, self._key_filter)
        if self.receiver is not None:
            return _ReceiverTransport(self.receiver)
        raise RuntimeError("call init_on_sender or init_on_receiver first")

    def shutdown(self) -> None:
        """End the threads. Idempotent."""
        if self.publisher is not None:
            self.publisher.close()
        if self.receiver is not None:
            self.receiver.close()
        super().shutdown()

    def _init_on_sender_impl(self, *, model_id: str, context: Any = None) -> None:
        self.model_id, self.context = model_id, context
        self.publisher = WeightPublisher(self._address, handshake=self._handshake, context=self._context)
        self._register_worker_sender(worker_idx=0)

    def _init_on_receiver_impl(
        self, *, model_id: str, context: Any = None, model: nn.Module | None = None, worker_idx: int | None = None
    ) -> None:
        self.model_id, self.context, self.worker_idx = model_id, context, worker_idx
        self.model = model
        self.receiver = WeightReceiver(self._address, handshake=self._handshake, context=self._context)
        self._register_transport_receiver()
