// Times one prediction after the other of a compiled ensemble, with no Python in the timed path.
#include <chrono>
#include <string>
#include <vector>

#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

// Predicts row by row, (rows, features) floats, over and over; writes the seconds of each of the calls.
extern "C" int effens_clock(const char* path, const float* rows, long count, long features, long calls,
                            double* seconds) {
  try {
    c10::InferenceMode guard;
    at::set_num_threads(1);
    torch::inductor::AOTIModelPackageLoader loader{std::string(path)};
    std::vector<at::Tensor> inputs;
    for (long i = 0; i < count; ++i) {
      inputs.push_back(torch::from_blob(const_cast<float*>(rows + i * features), {1, features}).clone());
    }
    volatile float kept = 0;
    for (long i = -1000; i < calls; ++i) {
      std::vector<at::Tensor> input{inputs[(i + 1000) % count]};
      auto began = std::chrono::steady_clock::now();
      auto answer = loader.run(input);
      kept = answer[0].data_ptr<float>()[0] + answer[1].data_ptr<float>()[0];
      std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
      if (i >= 0) seconds[i] = taken.count();
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
