"""Small reference modules for configs, tutorials and tables: ordinary LightningModules."""

from fl_lightning.models.classifier import Classifier, DigitsClassifier, FedAvg2NN, FedAvgCNN, LogisticRegression

__all__ = ["Classifier", "DigitsClassifier", "FedAvg2NN", "FedAvgCNN", "LogisticRegression"]
