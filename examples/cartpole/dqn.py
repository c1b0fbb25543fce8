"""A double DQN in numpy: two hidden layers, Huber loss, Adam, a target network that follows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np


class Network:
    """Q-values of all actions: (n, inputs) -> (n, actions)."""

    def __init__(self, inputs: int, actions: int, hidden: int, rng: np.random.Generator) -> None:
        sizes = [(inputs, hidden), (hidden, hidden), (hidden, actions)]
        self.parameters: list[np.ndarray] = []
        for rows, columns in sizes:
            weights = rng.standard_normal((rows, columns)) * np.sqrt(2 / rows)
            self.parameters += [weights.astype(np.float32), np.zeros(columns, np.float32)]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.layers(x)[-1]

    def layers(self, x: np.ndarray) -> list[np.ndarray]:
        """Input, both hidden layers, output."""
        w1, b1, w2, b2, w3, b3 = self.parameters
        first = np.maximum(x @ w1 + b1, 0)
        second = np.maximum(first @ w2 + b2, 0)
        return [x, first, second, second @ w3 + b3]

    def gradients(self, layers: list[np.ndarray], slope: np.ndarray) -> list[np.ndarray]:
        """Of the loss by all parameters; `slope` is that by the output."""
        x, first, second, _ = layers
        _, _, w2, _, w3, _ = self.parameters
        at_second = (slope @ w3.T) * (second > 0)
        at_first = (at_second @ w2.T) * (first > 0)
        return [
            *(x.T @ at_first, at_first.sum(0)),
            *(first.T @ at_second, at_second.sum(0)),
            *(second.T @ slope, slope.sum(0)),
        ]


class DQN:
    """Learns from batches of transitions; |TD error| is what it returns."""

    def __init__(self, inputs: int, actions: int, *, seed: int, hidden: int = 64) -> None:
        self.rng = np.random.default_rng(seed)
        self.online = Network(inputs, actions, hidden, self.rng)
        self.target = Network(inputs, actions, hidden, self.rng)
        self.target.parameters = [p.copy() for p in self.online.parameters]
        self.moments = [np.zeros_like(p) for p in self.online.parameters * 2]
        self.updates = 0

    def act(self, observation: np.ndarray, epsilon: float) -> int:
        if self.rng.random() < epsilon:
            return int(self.rng.integers(2))
        return int(self.online(observation[None])[0].argmax())

    def learn(
        self,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        following: np.ndarray,
        terminal: np.ndarray,
        weights: np.ndarray,
        *,
        gamma: float = 0.99,
        rate: float = 1e-3,
        tau: float = 0.01,
    ) -> np.ndarray:
        rows = np.arange(len(actions))
        best = self.online(following).argmax(1)  # chosen by one network, valued by the other
        future = self.target(following)[rows, best]
        wanted = rewards + gamma * future * ~terminal
        layers = self.online.layers(observations)
        error = layers[-1][rows, actions] - wanted
        slope = np.zeros_like(layers[-1])
        slope[rows, actions] = weights * np.clip(error, -1, 1) / len(rows)
        self._adam(self.online.gradients(layers, slope), rate)
        for slow, fast in zip(self.target.parameters, self.online.parameters, strict=True):
            slow += tau * (fast - slow)
        return np.abs(error)

    def _adam(self, gradients: list[np.ndarray], rate: float) -> None:
        self.updates += 1
        n = len(gradients)
        step = rate * np.sqrt(1 - 0.999**self.updates) / (1 - 0.9**self.updates)
        for i, gradient in enumerate(gradients):
            mean, square = self.moments[i], self.moments[n + i]
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient * gradient - square)
            self.online.parameters[i] -= np.float32(step) * mean / (np.sqrt(square) + 1e-7)

    def save(self, path: Path, steps: int, note: str = "") -> None:
        """Whole or not at all: what is killed while saving keeps the file before.

        `note` is kept with it, for whoever loads it.
        """
        arrays = [*self.online.parameters, *self.target.parameters, *self.moments]
        aside = path.with_suffix(".tmp.npz")
        stream = json.dumps(self.rng.bit_generator.state)
        np.savez(aside, *arrays, counts=np.array([steps, self.updates]), texts=[stream, note])
        os.replace(aside, path)

    def load(self, path: Path) -> tuple[int, str]:
        """Go on from a file; how many steps that was, and the note."""
        with np.load(path) as stored:
            arrays = [stored[f"arr_{i}"] for i in range(len(stored.files) - 2)]
            steps, self.updates = (int(count) for count in stored["counts"])
            stream, note = (str(text) for text in stored["texts"])
        self.rng.bit_generator.state = json.loads(stream)
        n = len(self.online.parameters)
        self.online.parameters = arrays[:n]
        self.target.parameters = arrays[n : 2 * n]
        self.moments = arrays[2 * n :]
        return steps, note
