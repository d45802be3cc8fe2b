"""Exports of scikit-learn models, trained on its own data sets, without ZipMap."""

from pathlib import Path

import numpy as np
from skl2onnx import to_onnx
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def everything(folder: Path) -> None:
    x, y = load_breast_cancer(return_X_y=True)
    scaled = StandardScaler().fit_transform(x).astype(np.float32)
    classes = {
        "sk_logistic": LogisticRegression(max_iter=500),
        "sk_mlp": make_pipeline(StandardScaler(), MLPClassifier((16,), max_iter=600, random_state=0)),
        "sk_mlp_plain": MLPClassifier((16,), max_iter=600, random_state=0),
        "sk_forest": RandomForestClassifier(20, max_depth=6, random_state=0),
        "sk_boosting": GradientBoostingClassifier(n_estimators=20, random_state=0),
    }
    for name, model in classes.items():
        write(folder, name, model.fit(scaled, y), scaled, {"zipmap": False})

    x, y = load_diabetes(return_X_y=True)
    x = (x / x.std(axis=0)).astype(np.float32)
    for name, model in (("sk_linear", LinearRegression()),
                        ("sk_forest_regressor", RandomForestRegressor(10, max_depth=5, random_state=0))):
        write(folder, name, model.fit(x, y), x, None)


def write(folder: Path, name: str, model, x: np.ndarray, options: dict | None) -> None:
    exported = to_onnx(model, x[:1], options=options, target_opset={"": 17, "ai.onnx.ml": 2}, name=name)
    (folder / f"{name}.onnx").write_bytes(exported.SerializeToString())
