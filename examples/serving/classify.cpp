// Classify images with an exported .onnx file in C++, with ONNX Runtime alone.
//
//   g++ -std=c++17 -O2 classify.cpp -I$ORT/include -L$ORT/lib -lonnxruntime -o classify
//   ./classify digits.onnx images.f32
//
// images.f32: float32 [n, C, H, W], prepared as the file's metadata "preprocess" says (classify.py shows how).
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

// The threshold of the metadata "guard", {"score": ..., "threshold": {"value": ...}}; without one nothing is unknown.
static float threshold_of(const std::string& guard) {
  const auto at = guard.find("\"value\":");
  return at == std::string::npos ? -std::numeric_limits<float>::infinity() : std::strtof(guard.c_str() + at + 8, nullptr);
}

int main(int argc, char** argv) try {
  if (argc != 3) {
    std::cerr << "usage: classify FILE.onnx IMAGES.f32\n";
    return 2;
  }
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "classify");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(1);
  options.AddConfigEntry("session.x64quantprecision", "1");  // 8-bit sums saturate without VNNI or AMX
  Ort::Session session(env, argv[1], options);

  Ort::AllocatorWithDefaultOptions allocator;
  const auto guard = session.GetModelMetadata().LookupCustomMetadataMapAllocated("guard", allocator);
  const float threshold = threshold_of(guard ? guard.get() : "");

  auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();  // [-1, C, H, W]
  const size_t size = shape[1] * shape[2] * shape[3];
  std::ifstream file(argv[2], std::ios::binary);
  const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  shape[0] = static_cast<int64_t>(bytes.size() / sizeof(float) / size);
  if (shape[0] == 0 || bytes.size() != shape[0] * size * sizeof(float)) {
    std::cerr << argv[2] << ": not whole images of " << size << " numbers\n";
    return 2;
  }
  auto* pixels = reinterpret_cast<float*>(const_cast<char*>(bytes.data()));
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto images = Ort::Value::CreateTensor<float>(memory, pixels, shape[0] * size, shape.data(), shape.size());

  const char* inputs[] = {"images"};
  const char* outputs[] = {"logits", "score"};
  const auto found = session.Run(Ort::RunOptions{}, inputs, &images, 1, outputs, 2);
  const auto* logits = found[0].GetTensorData<float>();
  const auto* scores = found[1].GetTensorData<float>();
  const auto classes = found[0].GetTensorTypeAndShapeInfo().GetShape()[1];
  for (int64_t i = 0; i < shape[0]; ++i) {
    const auto* row = logits + i * classes;
    std::cout << std::max_element(row, row + classes) - row << ' ' << scores[i] << ' '
              << (scores[i] < threshold ? "unknown" : "known") << '\n';
  }
  return 0;
} catch (const Ort::Exception& error) {
  std::cerr << argv[1] << ": " << error.what() << '\n';
  return 1;
}
