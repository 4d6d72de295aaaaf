/* Eight vCPU threads send IPIs round a ring, and a device holds a level line up until its handler has looked after it. */
#include <fastexit.hpp>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <thread>

constexpr uint32_t CPUS = 8, IPIS = 20000, LEVELS = 1000, LINE = 10, AT = 3, IPI = 0x41, DEVICE = 0x51;
constexpr uint32_t ICR = 0x830, EOI = 0x80b, TPR = 0x808, IOAPIC = 0xfec00000;

static fastexit::Machine machine, copy;
static std::atomic<uint32_t> received[CPUS], served;

static void must(fastexit::Status status)
{
    if (!status)
        std::fprintf(stderr, "%s; %s\n", status.text(), machine.last_error()), std::exit(1);
}

static void run(uint32_t me)
{
    const uint32_t to = (me + 1) % CPUS;
    fastexit::Result result;

    for (uint32_t sent = 0; received[me] < IPIS || received[to] < IPIS || served < LEVELS; std::this_thread::yield()) {
        if (sent < IPIS && received[to] == sent) /* the next one when the one before has been taken */
            must(machine.wrmsr(me, ICR, uint64_t{to} << 32 | IPI, result)), sent++;
        (void)machine.notify(me); /* FX_NOTIFY: its CPU takes what was posted, if anything was */
        while (auto vector = machine.ack(me)) {
            if (*vector == DEVICE)
                must(machine.irq_line(LINE, 0, result)); /* the handler has asked the device what it wants */
            must(machine.wrmsr(me, EOI, 0, result));
            ++(*vector == DEVICE ? served : received[me]);
        }
    }
}

int main()
{
    fastexit::Result result;
    std::vector<std::thread> threads;

    must(fastexit::Machine::open(fastexit::Config(CPUS).flags(FX_BOOT_X2APIC), machine));
    for (auto [reg, value] : {std::pair{0x11 + 2 * LINE, AT << 24}, {0x10 + 2 * LINE, DEVICE | 1 << 15}}) {
        must(machine.mem_write(0, IOAPIC, 4, reg, result)); /* the pin's entry: level, to vCPU AT */
        must(machine.mem_write(0, IOAPIC + 0x10, 4, value, result));
    }
    for (uint32_t v = 0; v < CPUS; v++) /* the first exit of each: now it is in the guest */
        must(machine.wrmsr(v, TPR, 0, result)), threads.emplace_back(run, v);
    for (uint32_t i = 0; i < LEVELS; i++)
        for (must(machine.irq_line(LINE, 1, result)); served == i;)
            std::this_thread::yield();
    for (auto &thread : threads)
        thread.join();
    must(fastexit::Machine::restore(machine.snapshot(), copy));
    std::printf("%u vCPUs: %u IPIs each, %u level interrupts\n", CPUS, received[0].load(), served.load());
    return copy.snapshot() != machine.snapshot();
}
