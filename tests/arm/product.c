/* One matrix product of ggml, a number of times: `product TYPE repacked|mapped COLUMNS ROWS VECTORS TIMES`.
 *
 * TYPE is ggml's name of the weights' type, in lower case. The weights are COLUMNS x ROWS random numbers, in ordinary
 * memory or in ggml's buffer for rearranged weights; they are multiplied with VECTORS vectors of float32, by one thread.
 * Prints the norm of the result's error, relative to the product in double precision of the same, rounded weights.
 * Exit code 3: there is no kernel for rearranged weights of this type.
 */
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { COMPARED = 2 };

static ggml_backend_buffer_type_t repack_buffer(void) {
    ggml_backend_dev_t cpu = ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0);
    ggml_backend_dev_get_extra_bufts_t more = (ggml_backend_dev_get_extra_bufts_t) ggml_backend_reg_get_proc_address(
        ggml_backend_cpu_reg(), "ggml_backend_dev_get_extra_bufts");
    for (ggml_backend_buffer_type_t *one = more ? more(cpu) : NULL; one && *one; one++) {
        if (strcmp(ggml_backend_buft_name(*one), "CPU_REPACK") == 0) {
            return *one;
        }
    }
    return NULL;
}

static float *numbers(int64_t count) {
    float *values = malloc(count * sizeof(float));
    for (int64_t i = 0; i < count; i++) {
        values[i] = rand() / (float) RAND_MAX - 0.5f;
    }
    return values;
}

static enum ggml_type type_named(const char *name) {
    for (int type = 0; type < GGML_TYPE_COUNT; type++) {
        const char *known = ggml_type_name(type);
        if (known && strcmp(known, name) == 0) {
            return type;
        }
    }
    return GGML_TYPE_COUNT;
}

/* Of the first vectors only: the product in double precision is slow. */
static double relative_error(const float *found, const float *weights, const float *inputs, int64_t columns,
                             int64_t rows) {
    double error = 0, norm = 0;
    for (int64_t vector = 0; vector < COMPARED; vector++) {
        for (int64_t row = 0; row < rows; row++) {
            double sum = 0;
            for (int64_t column = 0; column < columns; column++) {
                sum += (double) weights[row * columns + column] * inputs[vector * columns + column];
            }
            error += pow(found[vector * rows + row] - sum, 2);
            norm += sum * sum;
        }
    }
    return sqrt(error / norm);
}

int main(int argc, char **argv) {
    if (argc != 7) {
        return 2;
    }
    const enum ggml_type type = type_named(argv[1]);
    const int64_t columns = atol(argv[3]), rows = atol(argv[4]), vectors = atol(argv[5]);
    if (type == GGML_TYPE_COUNT) {
        return 2;
    }
    struct ggml_init_params none = {ggml_tensor_overhead() * 8, NULL, true};
    struct ggml_init_params graphs = {ggml_tensor_overhead() * 8 + ggml_graph_overhead(), NULL, true};
    struct ggml_context *stored = ggml_init(none), *computed = ggml_init(graphs);
    struct ggml_tensor *weights = ggml_new_tensor_2d(stored, type, columns, rows);
    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_buffer_type_t place =
        strcmp(argv[2], "repacked") == 0 ? repack_buffer() : ggml_backend_cpu_buffer_type();
    ggml_backend_cpu_set_n_threads(backend, 1);
    struct ggml_tensor *inputs = ggml_new_tensor_2d(computed, GGML_TYPE_F32, columns, vectors);
    struct ggml_tensor *result = ggml_mul_mat(computed, weights, inputs);
    if (place == NULL || ggml_backend_alloc_ctx_tensors_from_buft(stored, place) == NULL ||
        (strcmp(argv[2], "repacked") == 0 && weights->extra == NULL)) {
        return 3;
    }
    struct ggml_cgraph *graph = ggml_new_graph(computed);
    ggml_build_forward_expand(graph, result);
    ggml_backend_alloc_ctx_tensors(computed, backend);

    float *values = numbers(columns * rows);
    void *bytes = malloc(ggml_nbytes(weights));
    if (type == GGML_TYPE_F32) {
        memcpy(bytes, values, ggml_nbytes(weights));
    } else {
        ggml_quantize_chunk(type, values, bytes, 0, rows, columns, NULL);
    }
    ggml_backend_tensor_set(weights, bytes, 0, ggml_nbytes(weights));
    float *operands = numbers(columns * vectors);
    ggml_backend_tensor_set(inputs, operands, 0, ggml_nbytes(inputs));
    for (long i = atol(argv[6]); i > 0; i--) {
        ggml_backend_graph_compute(backend, graph);
    }
    if (type != GGML_TYPE_F32) {
        ggml_get_type_traits(type)->to_float(bytes, values, columns * rows);
    }
    float *found = malloc(ggml_nbytes(result));
    ggml_backend_tensor_get(result, found, 0, ggml_nbytes(result));
    printf("%.3e\n", relative_error(found, values, operands, columns, rows));
    return 0;
}
