"""A small drawn world with ground truth: scenes, pictures and texts as pure functions of a seed."""

from cmg_gguf.tiny.scenes.drawing import Pixels, draw
from cmg_gguf.tiny.scenes.world import IMAGE_SIZE, Scene, SceneKind, Split, Thing, make_scene

__all__ = ["IMAGE_SIZE", "Pixels", "Scene", "SceneKind", "Split", "Thing", "draw", "make_scene"]
