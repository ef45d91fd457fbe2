"""What a device has left."""
import torch


def free_bytes(device: torch.device) -> int:
    """What tensors can still take on the device, torch's unused blocks included; on a CPU, what the system can give."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with open("/proc/meminfo") as file:  # the page cache counts as free, as it does not in sysconf's numbers
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in file}
    return 1024 * kilobytes["MemAvailable"]
