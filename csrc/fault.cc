#include "fault.h"

#include <signal.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <mutex>

namespace eightfold {
namespace {

constexpr size_t kMostFiles = 1024;
constexpr size_t kMostName = 1024;
constexpr char kBefore[] = "eightfold: weights in ";
constexpr char kAfter[] =
    ": got a file that was cut short while it was in use, expected it as it was. Fetch or write it again.\n";

// The handler reads what another thread may be writing: `begin` is set last, and 0 first.
struct File {
    std::atomic<uintptr_t> begin{0};
    size_t nbytes = 0;
    size_t length = 0;
    char name[kMostName];
};

File files[kMostFiles];
std::mutex mutex;
struct sigaction before;

void say(const char* text, size_t length) {
    while (length > 0) {
        const ssize_t written = write(STDERR_FILENO, text, length);
        if (written <= 0) return;
        text += written, length -= static_cast<size_t>(written);
    }
}

void on_bus_error(int, siginfo_t* info, void*) {
    const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
    for (const File& file : files) {
        const uintptr_t begin = file.begin.load(std::memory_order_acquire);
        if (begin == 0 || at < begin || at - begin >= file.nbytes) continue;
        say(kBefore, sizeof(kBefore) - 1);
        say(file.name, file.length);
        say(kAfter, sizeof(kAfter) - 1);
        _exit(1);
    }
    sigaction(SIGBUS, &before, nullptr);  // the access is tried again, and that handler is called
}

}  // namespace

void watch_mapping(uintptr_t begin, size_t nbytes, const std::string& name) {
    const std::lock_guard lock(mutex);
    static const bool is_installed = [] {
        struct sigaction action = {};
        action.sa_sigaction = on_bus_error;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        return sigaction(SIGBUS, &action, &before) == 0;
    }();
    (void)is_installed;
    const uintptr_t wanted = nbytes == 0 ? begin : 0;
    for (File& file : files) {
        if (file.begin.load(std::memory_order_relaxed) != wanted) continue;
        file.begin.store(0, std::memory_order_release);
        if (nbytes == 0) return;
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        file.nbytes = (nbytes + page - 1) / page * page;
        file.length = name.copy(file.name, kMostName);
        file.begin.store(begin, std::memory_order_release);
        return;
    }
}

}  // namespace eightfold
