"""Gradients of what tests compute with Keras, on whichever backend they run."""

import keras


def of(function, arrays=(), variables=()):
    """Call a function of some arrays, and take the gradient of its first result, a scalar.

    Args:
        function: of a tensor for each array; what it returns is a scalar, or a tuple that begins with one. Layers
            within may be new, or stateful; their `losses` are seen within.
        arrays: float, to take the gradient with respect to.
        variables: of Keras, likewise.

    Returns:
        What the function returned and the gradients, one for each array and variable, as NumPy; None where nothing
        leads there (TensorFlow), or zeros (JAX, PyTorch).
    """
    backend = keras.backend.backend()
    found, told = {"tensorflow": _of_tensorflow, "jax": _of_jax, "torch": _of_torch}[backend](
        function, [keras.ops.convert_to_tensor(array) for array in arrays], list(variables)
    )
    numpy = keras.ops.convert_to_numpy
    return keras.tree.map_structure(numpy, found), [None if each is None else numpy(each) for each in told]


def _first(found):
    return found[0] if isinstance(found, tuple) else found


def _of_tensorflow(function, tensors, variables):
    import tensorflow as tf

    with tf.GradientTape(watch_accessed_variables=False) as tape:
        for each in (*tensors, *(variable.value for variable in variables)):
            tape.watch(each)
        found = function(*tensors)
    return found, tape.gradient(_first(found), [*tensors, *(variable.value for variable in variables)])


def _of_jax(function, tensors, variables):
    import jax

    def scored(tensors, values):
        with keras.StatelessScope(state_mapping=list(zip(variables, values)), collect_losses=True):
            found = function(*tensors)
        return _first(found), found

    values = [variable.value for variable in variables]
    (of_tensors, of_values), found = jax.grad(scored, argnums=(0, 1), has_aux=True)(tensors, values)
    return found, [*of_tensors, *of_values]


def _of_torch(function, tensors, variables):
    import torch

    for tensor in tensors:
        tensor.requires_grad_()
    found = function(*tensors)
    wanted = [*tensors, *(variable.value for variable in variables)]
    told = torch.autograd.grad(_first(found), wanted, allow_unused=True, materialize_grads=True)
    return found, told
