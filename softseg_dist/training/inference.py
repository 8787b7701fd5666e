"""From a model and a prepared case to its soft map."""

from __future__ import annotations

import numpy as np
import torch

from softseg_dist.data.preprocess import Sample
from softseg_dist.training.model import Model

ITEMS_AT_ONCE = 16  # bounds memory; the result does not depend on it


@torch.inference_mode()
def predict_sample(model: Model, sample: Sample, device: str = "cpu") -> np.ndarray:
    """Soft map [N K *S] float32 of all items of one case.

    The activation sees all items of the case at once, so that a maximum that runs over "the batch" runs over the case, whatever
    else is predicted beside it.
    """
    model.eval()
    image = torch.from_numpy(np.array(sample.image))
    logits = [model.logits(part.to(device)) for part in image.split(ITEMS_AT_ONCE)]
    prediction: np.ndarray = model.activation(torch.cat(logits)).float().cpu().numpy()
    return prediction
