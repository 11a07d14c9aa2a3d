"""The suite's results say on what they were measured."""

from fastkd import machine


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastkd"] = machine.describe()
