"""Multitask: ten clients with five tasks between them fine-tune one adapter per task, and name none."""
