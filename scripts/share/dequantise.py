"""dequantise.py MODEL.gguf OUT.gguf: the same model with every weight in F32, so that the KV cache is all that a
comparison of caches measures (quantised weights round the activations anew for the slightest difference).

Metadata and tokenizer stay as they are. Written under another name and renamed when complete. Run by `tq eval
--f32-weights`; prints "progress FRACTION" and ends with "result OUT.gguf", or with one line that says what failed.
"""
import os
import shutil
import sys

try:
    import gguf
    import numpy
    from gguf.quants import dequantize
except ImportError as error:
    sys.exit(f"--f32-weights needs the Python package {error.name or 'gguf'}, which {sys.executable} lacks; install gguf "
             f"there, or name another Python in TQ_PYTHON")


def copy(source, target):
    reader = gguf.GGUFReader(source)
    size = sum(int(numpy.prod(tensor.shape)) * 4 for tensor in reader.tensors)
    if shutil.disk_usage(os.path.dirname(target) or ".").free < size + (64 << 20):
        sys.exit(f"{target}: the F32 copy needs {size >> 20} MiB there; make room or set XDG_CACHE_HOME to another disk")
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    writer = gguf.GGUFWriter(target, architecture, endianess=reader.endianess)
    if reader.alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
        writer.add_custom_alignment(reader.alignment)
    skipped = (gguf.Keys.General.ARCHITECTURE, gguf.Keys.General.ALIGNMENT, gguf.Keys.General.FILE_TYPE)
    for field in reader.fields.values():
        if field.name in skipped or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        element = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, element)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        count = int(numpy.prod(tensor.shape))
        # GGUF names the fastest dimension first, NumPy last.
        writer.add_tensor_info(tensor.name, [int(n) for n in reversed(tensor.shape)], numpy.dtype(numpy.float32),
                               count * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, tensor in enumerate(reader.tensors):
        values = numpy.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=numpy.float32)
        writer.write_tensor_data(values)
        print(f"progress {(number + 1) / len(reader.tensors):.4f}", flush=True)
    writer.close()


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: dequantise.py MODEL.gguf OUT.gguf")
    source, target = sys.argv[1:]
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        copy(source, temporary)
        os.replace(temporary, target)
    except KeyboardInterrupt:
        sys.exit("stopped by Ctrl-C")
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        sys.exit(f"{source}: cannot be dequantised: {error}; --f32-weights needs a complete GGUF file with weights that "
                 f"the Python package gguf knows")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    print(f"result {target}")


if __name__ == "__main__":
    main()
