/*
 * fastexit.h for C++17: a machine that closes itself, statuses that are not overlooked, references where C has pointers
 * that may not be null. Header only; throws nothing, and works with -fno-exceptions and -fno-rtti.
 *
 *     fastexit::Machine machine;
 *     if (auto status = fastexit::Machine::open(fastexit::Config(8).flags(FX_BOOT_X2APIC), machine); !status)
 *         return status.code();
 *     fastexit::Result result;
 *     if (!machine.wrmsr(0, 0x830, 1ull << 32 | 0xfd, result))
 *         ...
 *
 * The methods are those of fastexit.h, which says what each does and who may call it.
 */
#ifndef FASTEXIT_HPP
#define FASTEXIT_HPP

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "fastexit_calls.h"

namespace fastexit {

using Exit = struct ::fx_exit;
using Outcome = struct ::fx_outcome;
using Result = struct ::fx_result;
using Target = struct ::fx_target;
using Cpu = struct ::fx_cpu;
using Region = struct ::fx_region;
using Route = struct ::fx_route;
using Event = struct ::fx_event;
using Trace = struct ::fx_trace;

/* What a call came to: true is FX_OK. */
class [[nodiscard]] Status {
    int32_t value;

public:
    constexpr explicit Status(int32_t code = FX_OK) noexcept : value(code) {}
    constexpr explicit operator bool() const noexcept { return value == FX_OK; }
    constexpr int32_t code() const noexcept { return value; }
    constexpr bool error() const noexcept { return value < 0; }
    constexpr bool operator==(int32_t code) const noexcept { return value == code; }
    constexpr bool operator!=(int32_t code) const noexcept { return value != code; }
    const char *text() const noexcept { return fx_strerror(value); }
};

/* struct fx_config; the fields that are not named here are set in the struct. */
struct Config : fx_config {
    explicit Config(uint32_t count = 1) noexcept : fx_config{}
    {
        fx_config::size = sizeof(fx_config);
        fx_config::abi = FX_ABI_VERSION;
        fx_config::vcpus = count;
    }
    Config &flags(uint32_t bits) noexcept { return fx_config::flags |= bits, *this; }
    Config &vendor(uint32_t number) noexcept { return fx_config::vendor = number, *this; }
    Config &kernel(uint32_t number) noexcept { return fx_config::kernel = number, *this; }
    Config &costs(const char *profile) noexcept { return fx_config::costs = profile, *this; }
};

/* struct fx_hooks for an object with any of notify(vcpu), wake(vcpu), kick(vcpu) and doorbell(vcpu), which outlives the
 * machine. They are called by whatever thread is in a call. */
struct Hooks : fx_hooks {
    Hooks() noexcept : fx_hooks{}
    {
        size = sizeof(fx_hooks);
        abi = FX_ABI_VERSION;
    }
    template <class Host> explicit Hooks(Host &host) noexcept : Hooks()
    {
        context = &host;
        set_notify<Host>(0);
        set_wake<Host>(0);
        set_kick<Host>(0);
        set_doorbell<Host>(0);
    }

private:
    /* What a host does not have stays NULL: the second of each pair is taken then. */
#define FASTEXIT_HOOK(name)                                                                                               \
    template <class Host> auto set_##name(int) noexcept -> decltype(static_cast<void>(std::declval<Host &>().name(0u)))   \
    {                                                                                                                     \
        fx_hooks::name = [](void *self, uint32_t vcpu) { static_cast<Host *>(self)->name(vcpu); };                        \
    }                                                                                                                     \
    template <class Host> void set_##name(long) noexcept {}
    FASTEXIT_HOOK(notify)
    FASTEXIT_HOOK(wake)
    FASTEXIT_HOOK(kick)
    FASTEXIT_HOOK(doorbell)
#undef FASTEXIT_HOOK
};

/* A machine, or none. Moved, not copied; fx_close says when it may end. */
class Machine {
    fx_machine *m = nullptr;

public:
    Machine() noexcept = default;
    Machine(const Machine &) = delete;
    Machine &operator=(const Machine &) = delete;
    Machine(Machine &&other) noexcept : m(std::exchange(other.m, nullptr)) {}
    Machine &operator=(Machine &&other) noexcept
    {
        if (this != &other) {
            close();
            m = std::exchange(other.m, nullptr);
        }
        return *this;
    }
    ~Machine() { close(); }

    explicit operator bool() const noexcept { return m; }
    fx_machine *get() const noexcept { return m; }

    /* fx_open, fx_restore: on failure there is no machine, and last_error() has the line that says why. */
    static Status open(const fx_config &config, Machine &machine, const fx_hooks *hooks = nullptr) noexcept
    {
        machine.close();
        return Status{fx_open(&config, hooks, &machine.m, nullptr)};
    }
    static Status restore(const std::vector<std::byte> &bytes, Machine &machine, const fx_hooks *hooks = nullptr) noexcept
    {
        machine.close();
        return Status{fx_restore(bytes.data(), bytes.size(), hooks, &machine.m, nullptr)};
    }
    static const char *last_error() noexcept { return fx_last_error(); }

    void close() noexcept
    {
        if (m)
            fx_close(std::exchange(m, nullptr));
    }

    /* The whole machine as bytes; empty where it cannot be. */
    std::vector<std::byte> snapshot()
    {
        uint64_t needed = 0;

        if (fx_snapshot(m, nullptr, 0, &needed) != FX_OK)
            return {};
        std::vector<std::byte> bytes(needed);
        if (fx_snapshot(m, bytes.data(), bytes.size(), &needed) != FX_OK)
            bytes.clear();
        return bytes;
    }

    /* Everybody for whom the effects of a vCPU's last exit are, of this thread's last message without one. */
    std::vector<Target> targets(uint32_t vcpu = FX_NOBODY)
    {
        uint64_t count = 0;

        if (Status{fx_targets(m, vcpu, nullptr, 0, &count)}.error())
            return {};
        std::vector<Target> found(count);
        if (fx_targets(m, vcpu, found.data(), found.size(), &count) != FX_OK)
            found.clear();
        return found;
    }

    /* The guest's CPU: a vector, or nothing. */
    std::optional<uint32_t> pending(uint32_t vcpu) noexcept { return vector(fx_pending, vcpu); }
    std::optional<uint32_t> ack(uint32_t vcpu) noexcept { return vector(fx_ack, vcpu); }
    std::optional<uint32_t> eoi(uint32_t vcpu) noexcept { return vector(fx_eoi, vcpu); }

    // calls:begin
    [[nodiscard]] Status wrmsr(uint32_t vcpu, uint32_t msr, uint64_t value, Result &result) noexcept
    {
        return Status{fx_wrmsr(m, vcpu, msr, value, &result)};
    }
    [[nodiscard]] Status rdmsr(uint32_t vcpu, uint32_t msr, Result &result) noexcept
    {
        return Status{fx_rdmsr(m, vcpu, msr, &result)};
    }
    [[nodiscard]] Status mmio_write(uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                                    Result &result) noexcept
    {
        return Status{fx_mmio_write(m, vcpu, offset, length, value, &result)};
    }
    [[nodiscard]] Status mmio_read(uint32_t vcpu, uint32_t offset, uint32_t length, Result &result) noexcept
    {
        return Status{fx_mmio_read(m, vcpu, offset, length, &result)};
    }
    [[nodiscard]] Status exit(const struct fx_exit &exit, Result &result) noexcept
    {
        return Status{fx_exit(m, &exit, &result)};
    }
    [[nodiscard]] Status run(const struct fx_exit *exits, struct fx_outcome *outcomes, uint64_t n,
                             uint64_t &done) noexcept
    {
        return Status{fx_run(m, exits, outcomes, n, &done)};
    }
    [[nodiscard]] Status inject(uint64_t address, uint32_t data, Result &result) noexcept
    {
        return Status{fx_inject(m, address, data, &result)};
    }
    [[nodiscard]] Status notify(uint32_t vcpu) noexcept { return Status{fx_notify(m, vcpu)}; }
    [[nodiscard]] Status attention(uint32_t first, uint32_t &vcpu, uint32_t &effects) noexcept
    {
        return Status{fx_attention(m, first, &vcpu, &effects)};
    }
    [[nodiscard]] Status pending(uint32_t vcpu, uint32_t &vector) noexcept
    {
        return Status{fx_pending(m, vcpu, &vector)};
    }
    [[nodiscard]] Status ack(uint32_t vcpu, uint32_t &vector) noexcept { return Status{fx_ack(m, vcpu, &vector)}; }
    [[nodiscard]] Status eoi(uint32_t vcpu, uint32_t &vector) noexcept { return Status{fx_eoi(m, vcpu, &vector)}; }
    [[nodiscard]] Status get_cpu(uint32_t vcpu, struct fx_cpu &cpu) noexcept
    {
        return Status{fx_get_cpu(m, vcpu, &cpu)};
    }
    [[nodiscard]] Status set_cpu(uint32_t vcpu, const struct fx_cpu &cpu) noexcept
    {
        return Status{fx_set_cpu(m, vcpu, &cpu)};
    }
    [[nodiscard]] Status enter(uint32_t vcpu, Result &result) noexcept { return Status{fx_enter(m, vcpu, &result)}; }
    [[nodiscard]] Status reenter(uint32_t vcpu, Result &result) noexcept
    {
        return Status{fx_reenter(m, vcpu, &result)};
    }
    [[nodiscard]] Status set_msr(uint32_t vcpu, uint32_t msr, uint64_t value) noexcept
    {
        return Status{fx_set_msr(m, vcpu, msr, value)};
    }
    [[nodiscard]] Status get_msr(uint32_t vcpu, uint32_t msr, uint64_t &value) noexcept
    {
        return Status{fx_get_msr(m, vcpu, msr, &value)};
    }
    [[nodiscard]] Status get_lapic(uint32_t vcpu, void *page, uint64_t size) noexcept
    {
        return Status{fx_get_lapic(m, vcpu, page, size)};
    }
    [[nodiscard]] Status set_lapic(uint32_t vcpu, const void *page, uint64_t size) noexcept
    {
        return Status{fx_set_lapic(m, vcpu, page, size)};
    }
    [[nodiscard]] Status reset(uint32_t vcpu, uint32_t kind) noexcept { return Status{fx_reset(m, vcpu, kind)}; }
    [[nodiscard]] Status set_time(uint64_t ns, struct fx_result *results, uint64_t room, uint64_t &count) noexcept
    {
        return Status{fx_set_time(m, ns, results, room, &count)};
    }
    [[nodiscard]] Status next_timer(uint64_t &ns) noexcept { return Status{fx_next_timer(m, &ns)}; }
    [[nodiscard]] Status snapshot(void *buffer, uint64_t size, uint64_t &needed) noexcept
    {
        return Status{fx_snapshot(m, buffer, size, &needed)};
    }
    [[nodiscard]] Status region(uint32_t which, struct fx_region &region) noexcept
    {
        return Status{fx_region(m, which, &region)};
    }
    [[nodiscard]] Status mem_write(uint32_t vcpu, uint64_t gpa, uint32_t length, uint64_t value,
                                   Result &result) noexcept
    {
        return Status{fx_mem_write(m, vcpu, gpa, length, value, &result)};
    }
    [[nodiscard]] Status mem_read(uint32_t vcpu, uint64_t gpa, uint32_t length, Result &result) noexcept
    {
        return Status{fx_mem_read(m, vcpu, gpa, length, &result)};
    }
    [[nodiscard]] Status io_write(uint32_t vcpu, uint32_t port, uint32_t length, uint32_t value,
                                  Result &result) noexcept
    {
        return Status{fx_io_write(m, vcpu, port, length, value, &result)};
    }
    [[nodiscard]] Status io_read(uint32_t vcpu, uint32_t port, uint32_t length, Result &result) noexcept
    {
        return Status{fx_io_read(m, vcpu, port, length, &result)};
    }
    [[nodiscard]] Status targets(uint32_t vcpu, struct fx_target *targets, uint64_t room, uint64_t &count) noexcept
    {
        return Status{fx_targets(m, vcpu, targets, room, &count)};
    }
    [[nodiscard]] Status set_guest_memory(void *memory, uint64_t bytes) noexcept
    {
        return Status{fx_set_guest_memory(m, memory, bytes)};
    }
    [[nodiscard]] Status enable_synic(uint32_t vcpu, uint32_t version) noexcept
    {
        return Status{fx_enable_synic(m, vcpu, version)};
    }
    [[nodiscard]] Status hv_hypercall(uint32_t vcpu, uint64_t control, uint64_t input, uint64_t output,
                                      const uint64_t *xmm, Result &result) noexcept
    {
        return Status{fx_hv_hypercall(m, vcpu, control, input, output, xmm, &result)};
    }
    [[nodiscard]] Status get_hv_exit(uint32_t vcpu, struct fx_hv_exit &exit) noexcept
    {
        return Status{fx_get_hv_exit(m, vcpu, &exit)};
    }
    [[nodiscard]] Status complete_hypercall(uint32_t vcpu, uint64_t value) noexcept
    {
        return Status{fx_complete_hypercall(m, vcpu, value)};
    }
    [[nodiscard]] Status hv_sint_line(uint32_t vp_index, uint32_t sint, uint32_t level, Result &result) noexcept
    {
        return Status{fx_hv_sint_line(m, vp_index, sint, level, &result)};
    }
    [[nodiscard]] Status irq_line(uint32_t gsi, uint32_t level, Result &result) noexcept
    {
        return Status{fx_irq_line(m, gsi, level, &result)};
    }
    [[nodiscard]] Status set_gsi_routing(const struct fx_route *routes, uint32_t n) noexcept
    {
        return Status{fx_set_gsi_routing(m, routes, n)};
    }
    [[nodiscard]] Status irqfd_signal(uint32_t gsi, uint32_t resample, Result &result) noexcept
    {
        return Status{fx_irqfd_signal(m, gsi, resample, &result)};
    }
    [[nodiscard]] Status irqfd_resample(uint32_t gsi, uint32_t on) noexcept
    {
        return Status{fx_irqfd_resample(m, gsi, on)};
    }
    [[nodiscard]] Status irqfd_resampled(uint32_t gsi, uint64_t &count) noexcept
    {
        return Status{fx_irqfd_resampled(m, gsi, &count)};
    }
    [[nodiscard]] Status get_irqchip(uint32_t chip, void *state, uint64_t size) noexcept
    {
        return Status{fx_get_irqchip(m, chip, state, size)};
    }
    [[nodiscard]] Status set_irqchip(uint32_t chip, const void *state, uint64_t size) noexcept
    {
        return Status{fx_set_irqchip(m, chip, state, size)};
    }
    [[nodiscard]] Status create_pit(uint32_t speaker) noexcept { return Status{fx_create_pit(m, speaker)}; }
    [[nodiscard]] Status get_pit(void *state, uint64_t size) noexcept { return Status{fx_get_pit(m, state, size)}; }
    [[nodiscard]] Status set_pit(const void *state, uint64_t size) noexcept
    {
        return Status{fx_set_pit(m, state, size)};
    }
    [[nodiscard]] Status get_ioapic_eoi(uint32_t vcpu, uint32_t &vector, uint32_t &level) noexcept
    {
        return Status{fx_get_ioapic_eoi(m, vcpu, &vector, &level)};
    }
    [[nodiscard]] Status nmi(uint32_t vcpu) noexcept { return Status{fx_nmi(m, vcpu)}; }
    [[nodiscard]] Status smi(uint32_t vcpu) noexcept { return Status{fx_smi(m, vcpu)}; }
    [[nodiscard]] Status interrupt(uint32_t vcpu, uint32_t vector) noexcept
    {
        return Status{fx_interrupt(m, vcpu, vector)};
    }
    [[nodiscard]] Status rsm(uint32_t vcpu) noexcept { return Status{fx_rsm(m, vcpu)}; }
    [[nodiscard]] Status hw_wrmsr(uint32_t vcpu, uint32_t msr, uint64_t value, Result &result) noexcept
    {
        return Status{fx_hw_wrmsr(m, vcpu, msr, value, &result)};
    }
    [[nodiscard]] Status hw_rdmsr(uint32_t vcpu, uint32_t msr, Result &result) noexcept
    {
        return Status{fx_hw_rdmsr(m, vcpu, msr, &result)};
    }
    [[nodiscard]] Status hw_mmio_write(uint32_t vcpu, uint32_t offset, uint32_t length, uint32_t value,
                                       Result &result) noexcept
    {
        return Status{fx_hw_mmio_write(m, vcpu, offset, length, value, &result)};
    }
    [[nodiscard]] Status hw_mmio_read(uint32_t vcpu, uint32_t offset, uint32_t length, Result &result) noexcept
    {
        return Status{fx_hw_mmio_read(m, vcpu, offset, length, &result)};
    }
    [[nodiscard]] Status hw_deliver(uint32_t vcpu, uint32_t &vector) noexcept
    {
        return Status{fx_hw_deliver(m, vcpu, &vector)};
    }
    [[nodiscard]] Status hw_cr8(uint32_t vcpu, uint64_t value, Result &result) noexcept
    {
        return Status{fx_hw_cr8(m, vcpu, value, &result)};
    }
    [[nodiscard]] Status settle(uint32_t vcpu, Result &result) noexcept
    {
        return Status{fx_settle(m, vcpu, &result)};
    }
    [[nodiscard]] Status take(uint32_t vcpu, struct fx_event &event) noexcept
    {
        return Status{fx_take(m, vcpu, &event)};
    }
    [[nodiscard]] Status advance(uint64_t ns) noexcept { return Status{fx_advance(m, ns)}; }
    [[nodiscard]] Status run_timers(uint32_t vcpu, struct fx_result *results, uint64_t room, uint64_t &count) noexcept
    {
        return Status{fx_run_timers(m, vcpu, results, room, &count)};
    }
    [[nodiscard]] Status next_timer_of(uint32_t vcpu, uint64_t &ns) noexcept
    {
        return Status{fx_next_timer_of(m, vcpu, &ns)};
    }
    [[nodiscard]] Status set_costs(const char *costs) noexcept { return Status{fx_set_costs(m, costs)}; }
    [[nodiscard]] Status set_trace(fx_tracer trace, void *context) noexcept
    {
        return Status{fx_set_trace(m, trace, context)};
    }
    [[nodiscard]] Status trace_text(const struct fx_trace &record, char *line, uint64_t size) noexcept
    {
        return Status{fx_trace_text(m, &record, line, size)};
    }
    [[nodiscard]] Status run_results(const struct fx_exit *exits, struct fx_result *results, uint64_t n,
                                     uint64_t &done) noexcept
    {
        return Status{fx_run_results(m, exits, results, n, &done)};
    }
    // calls:end

private:
    std::optional<uint32_t> vector(int32_t (*call)(fx_machine *, uint32_t, uint32_t *), uint32_t vcpu) noexcept
    {
        uint32_t found = 0;

        return call(m, vcpu, &found) == FX_OK ? std::optional<uint32_t>(found) : std::nullopt;
    }
};

} // namespace fastexit

#endif
