"""A linear head on frozen features."""

from __future__ import annotations

import numpy as np

__all__ = ["probe"]


def probe(
    features: np.ndarray,
    labels: np.ndarray,
    eval_features: np.ndarray,
    *,
    seed: int = 0,
) -> tuple[np.ndarray, int]:
    """Fit the best linear head on frozen features.

    Logistic regression on standardised features, its regularisation chosen by 3-fold
    cross-validation: the strongest form of "frozen features + head", so that what
    fine-tuning adds is not overstated. For numbers, ridge regression, chosen likewise.

    Parameters
    ----------
    features : numpy.ndarray, shape (n, d)
        Of the training texts.
    labels : numpy.ndarray, shape (n,)
        Their classes, or numbers of a floating-point type.
    eval_features : numpy.ndarray, shape (m, d)
        Of the evaluation texts.
    seed : int
        Seed of the folds.

    Returns
    -------
    predictions : numpy.ndarray, shape (m,)
        Classes or numbers of the evaluation texts.
    trainable : int
        Weights of the head.
    """
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    numbers = np.issubdtype(labels.dtype, np.floating)
    estimator = Ridge() if numbers else LogisticRegression(max_iter=2000)
    strengths = [1e-3, 1e-2, 1e-1, 1.0]
    folds = KFold if numbers else StratifiedKFold
    head = GridSearchCV(
        make_pipeline(StandardScaler(), estimator),
        {"ridge__alpha": [1 / c for c in strengths]}
        if numbers
        else {"logisticregression__C": strengths},
        cv=folds(3, shuffle=True, random_state=seed),
    )
    # Its products are so small that BLAS threads cost ten times what they save.
    with threadpool_limits(1):
        head.fit(features, labels)
    model = head.best_estimator_[-1]
    return head.predict(eval_features), model.coef_.size + np.size(model.intercept_)
