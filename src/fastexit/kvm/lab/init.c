/* The only program of a lab's machine: does what records in shared memory ask for, and writes answers beside them.
 *
 * Everything that means something is decided in Python (wire.py has the same numbers): this side opens files, makes
 * ioctls, runs guests, looks at vCPUs. It is the init of its kernel, so it mounts, loads KVM and never returns.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum op { OPEN = 1, CLOSE, IOCTL, READ, WRITE, MEMORY, STORE, GUEST, FREE, EXECUTE, WATCH, LOOK, CLOCK, SLEEP, QUIT, ANSWER, DEADLINE, PROGRAM, SURVEY, LIVE };
enum { READY = 0x4654, HEADER = 4096, ARGUMENT = 1 << 16, SLOTS = 8192, PIECE = 1 << 20, EOIS = 64, MEMORY_BYTES = 0x10000, EXITS = 16, MSRS = 64 };
enum { LOOK_STATES = 1, LOOK_SREGS = 2, SET_REGS = 1, ANEW = 1 };

struct header {
	volatile uint32_t asked, request_bytes, spins, unused[13];
	volatile uint32_t done, answer_bytes, sleeping, ready;
};

struct record { uint16_t op, flags; uint32_t bytes; };
struct answer { int32_t result; uint32_t bytes; };

static struct header *header;
static uint8_t *requests, *answers, *answer_at, *answers_end;
static int bell = -1;

/* A line that names what is missing and ends the machine: there is nobody who could mend it. */
static void fail(const char *what)
{
	printf("fastexit-init: %s: %s\n", what, strerror(errno));
	fflush(stdout);
	tcdrain(1);
	reboot(RB_POWER_OFF);
	for (;;)
		pause();
}

#include "modules.h"

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

/* The kernel's ticks are due each TICK ns from PHASE on: an interrupt of the machine's, which is an exit of a guest's. */
static int64_t tick_ns, tick_phase;

static int64_t since_tick(int64_t time)
{
	return (time - tick_phase) % tick_ns;
}

/* The coarse clock moves with each tick; the earliest moment of some is nearest to when they are due. */
static void find_ticks(void)
{
	enum { TICKS = 4 };
	struct timespec last, t;
	int64_t earliest = INT64_MAX;

	clock_getres(CLOCK_MONOTONIC_COARSE, &t);
	tick_ns = t.tv_sec * 1000000000ll + t.tv_nsec;
	tick_phase = now() % tick_ns;
	for (int n = 0; n <= TICKS; n++) {
		clock_gettime(CLOCK_MONOTONIC_COARSE, &last);
		do
			clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
		while (t.tv_nsec == last.tv_nsec);
		if (n && since_tick(now() + tick_ns / 2) < earliest)
			earliest = since_tick(now() + tick_ns / 2);
		if (!n) /* the first one may have come out of idleness; the others are half a tick from the origin or so */
			tick_phase = now() % tick_ns;
	}
	tick_phase += earliest - tick_ns / 2;
}

/* Returns at a moment with no tick near it; which one it is. */
static int64_t between_ticks(void)
{
	enum { BEFORE_NS = 200000, BEHIND_NS = 20000 };
	int64_t time = now();

	while (since_tick(time) > tick_ns - BEFORE_NS || since_tick(time) < BEHIND_NS)
		time = now();
	return (time - tick_phase) / tick_ns;
}

/* ------------------------------------------------------------------------------------------------------ beginning */

static int number_in(const char *directory, const char *file)
{
	char path[512], text[32] = "";
	int fd;

	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", directory, file);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	if (read(fd, text, sizeof text - 1) < 0)
		text[0] = 0;
	close(fd);
	return strtol(text, NULL, 0);
}

static void map_shared_memory(void)
{
	DIR *devices = opendir("/sys/bus/pci/devices");
	struct dirent *entry;
	char path[512];
	struct stat found;
	int fd;

	while (devices && (entry = readdir(devices)))
		if (number_in(entry->d_name, "vendor") == 0x1af4 && number_in(entry->d_name, "device") == 0x1110)
			break;
	if (!devices || !entry)
		fail("no shared memory on the PCI bus");
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/enable", entry->d_name);
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, "1", 1) != 1)
		fail(path);
	close(fd);
	snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/resource2", entry->d_name);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &found))
		fail(path);
	header = mmap(NULL, found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (header == MAP_FAILED)
		fail("mmap of shared memory");
	requests = (uint8_t *)header + HEADER;
	answers = (uint8_t *)header + found.st_size / 2;
	answers_end = (uint8_t *)header + found.st_size;
	closedir(devices);
}

static void open_bell(void)
{
	struct termios raw;

	bell = open("/dev/ttyS1", O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (bell < 0 || tcgetattr(bell, &raw))
		fail("/dev/ttyS1");
	cfmakeraw(&raw);
	raw.c_cc[VMIN] = 1;
	raw.c_cc[VTIME] = 0;
	tcsetattr(bell, TCSANOW, &raw);
}

static void ignored(int number)
{
	(void)number; /* that it came is all: KVM_RUN returns with EINTR */
}

/* -------------------------------------------------------------------------------------------------------- answers */

/* Room for an answer's bytes; its result and length are written by put(). */
static uint8_t *room(size_t bytes)
{
	if (answer_at + sizeof(struct answer) + bytes + 8 > answers_end)
		return NULL;
	return answer_at + sizeof(struct answer);
}

static void put(int64_t result, size_t bytes)
{
	struct answer *answer = (struct answer *)answer_at;

	answer->result = result < 0 ? -errno : result;
	answer->bytes = bytes;
	answer_at += sizeof *answer + ((bytes + 7) & ~7ull);
}

static void put_error(int error)
{
	errno = error;
	put(-1, 0);
}

/* ------------------------------------------------------------------------------------------------- files and ioctls */

static void do_ioctl(const uint8_t *payload)
{
	static uint64_t buffer[ARGUMENT / 8];
	struct { uint32_t fd; uint16_t is_bytes, pointers; uint64_t request, value; } in;
	const uint32_t *fixups = (const uint32_t *)(payload + sizeof in);
	uint8_t *out;
	int64_t result;

	memcpy(&in, payload, sizeof in);
	if (!in.is_bytes) {
		put(ioctl(in.fd, in.request, in.value), 0);
		return;
	}
	if (in.value > sizeof buffer) {
		put_error(E2BIG);
		return;
	}
	memcpy(buffer, payload + sizeof in + 8 * in.pointers, in.value);
	for (int n = 0; n < in.pointers; n++) {
		uint64_t address = (uintptr_t)buffer + fixups[2 * n + 1];

		memcpy((uint8_t *)buffer + fixups[2 * n], &address, sizeof address);
	}
	result = ioctl(in.fd, in.request, buffer);
	if (result < 0 || !(in.request >> 31)) {
		put(result, 0);
		return;
	}
	out = room(in.value);
	if (!out) {
		put_error(ENOSPC);
		return;
	}
	memcpy(out, buffer, in.value);
	put(result, in.value);
}

/* Whole file, or what a pipe has right now. */
static void do_read(int fd, uint32_t most)
{
	uint8_t *out = room(most);
	uint32_t got = 0;
	ssize_t part = 0;

	if (!out) {
		put_error(ENOSPC);
		return;
	}
	while (got < most && (part = read(fd, out + got, most - got)) > 0)
		got += part;
	if (part < 0 && errno != EAGAIN && !got) {
		put(-1, 0);
		return;
	}
	put(got, got);
}

/* --------------------------------------------------------------------------------------------------------- guests */

static uint8_t *memories[SLOTS], *surveyed[SLOTS];
static uint32_t memory_bytes[SLOTS];
static struct { struct kvm_run *run; int fd; uint32_t bytes; } guests[SLOTS];

static void do_memory(int vm, uint32_t slot, uint32_t size)
{
	struct kvm_userspace_memory_region region = { .memory_size = size };
	uint8_t *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (bytes == MAP_FAILED || slot >= SLOTS) {
		put_error(ENOMEM);
		return;
	}
	region.userspace_addr = (uintptr_t)bytes;
	memories[slot] = bytes;
	memory_bytes[slot] = size;
	put(ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region), 0);
}

static void do_guest(int fd, uint32_t slot, uint32_t bytes)
{
	struct kvm_run *run = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (run == MAP_FAILED || slot >= SLOTS) {
		put_error(ENOMEM);
		return;
	}
	guests[slot].run = run;
	guests[slot].fd = fd;
	guests[slot].bytes = bytes;
	put(0, 0);
}

static void do_free(uint32_t what, uint32_t slot)
{
	if (what == MEMORY && memories[slot]) {
		munmap(memories[slot], memory_bytes[slot]);
		free(surveyed[slot]);
		memories[slot] = surveyed[slot] = NULL;
	} else if (what == GUEST && guests[slot].run) {
		munmap(guests[slot].run, guests[slot].bytes);
		guests[slot].run = NULL;
	}
	put(0, 0);
}

static void alarm_every(int64_t ns)
{
	struct itimerval timer = { { ns / 1000000000, ns % 1000000000 / 1000 }, { ns / 1000000000, ns % 1000000000 / 1000 } };

	setitimer(ITIMER_REAL, &timer, NULL);
}

/* KVM_RUN until a program ends, its time is over, or an exit is for Python to answer. */
static void do_execute(const uint8_t *payload, int set_regs)
{
	struct { uint32_t slot, unused; uint64_t rax, rcx, rdx, rdi, rsp, rip, rflags, ns; } in;
	struct { uint32_t late, exit_reason, port, eax, edx, user, msr_reason, msr_index; uint64_t msr_data; uint32_t eois, unused; } out = { 0 };
	struct kvm_regs regs = { 0 };
	struct kvm_run *run;
	uint8_t eois[EOIS], *bytes;
	int64_t due;
	int result = 0, fd, armed = 0;

	memcpy(&in, payload, sizeof in);
	run = guests[in.slot].run;
	fd = guests[in.slot].fd;
	if (set_regs) {
		regs.rax = in.rax;
		regs.rcx = in.rcx;
		regs.rdx = in.rdx;
		regs.rdi = in.rdi;
		regs.rsp = in.rsp;
		regs.rip = in.rip;
		regs.rflags = in.rflags;
		if (ioctl(fd, KVM_SET_REGS, &regs)) {
			put(-1, 0);
			return;
		}
	}
	due = now() + in.ns;
	for (;;) {
		if (!armed) {
			alarm_every(in.ns < 5000000 ? 3000000 : in.ns / 2);
			armed = 1;
		}
		result = ioctl(fd, KVM_RUN, 0);
		if (result && errno == EINTR && now() < due)
			continue;
		if (result) {
			out.late = errno == EINTR;
			break;
		}
		if (run->exit_reason == KVM_EXIT_MMIO) {
			out.user = KVM_EXIT_MMIO;
			memset(run->mmio.data, 0, sizeof run->mmio.data);
		} else if (run->exit_reason == KVM_EXIT_IOAPIC_EOI && out.eois < EOIS) {
			eois[out.eois++] = run->eoi.vector;
		} else {
			break;
		}
	}
	if (armed) {
		int kept = errno;

		alarm_every(0);
		errno = kept;
	}
	if (result && !out.late) {
		put(-1, 0);
		return;
	}
	out.exit_reason = run->exit_reason;
	if (!out.late && run->exit_reason == KVM_EXIT_IO) {
		out.port = run->io.port;
		if (ioctl(fd, KVM_GET_REGS, &regs)) {
			put(-1, 0);
			return;
		}
		out.eax = regs.rax;
		out.edx = regs.rdx;
	} else if (run->exit_reason == KVM_EXIT_X86_RDMSR || run->exit_reason == KVM_EXIT_X86_WRMSR) {
		out.msr_reason = run->msr.reason;
		out.msr_index = run->msr.index;
		out.msr_data = run->msr.data;
	}
	bytes = room(sizeof out + EOIS);
	if (!bytes) {
		put_error(ENOSPC);
		return;
	}
	memcpy(bytes, &out, sizeof out);
	memcpy(bytes + sizeof out, eois, out.eois);
	put(0, sizeof out + out.eois);
}

/* A program of a Windows guest, as do_execute; exits to user space on its way are answered here and told. */
static void do_program(const uint8_t *payload)
{
	struct { uint32_t slot, unused; struct kvm_regs regs; uint64_t ns, answer; } in;
	struct { int32_t result; uint32_t late, exit_reason, port, exits, ticked; struct kvm_regs regs; } out = { 0 };
	struct { uint32_t reason, type; uint64_t words[4]; } exits[EXITS] = { 0 };
	struct kvm_mp_state state;
	struct kvm_run *run;
	uint8_t *bytes;
	int64_t due, tick;
	int fd;

	memcpy(&in, payload, sizeof in);
	run = guests[in.slot].run;
	fd = guests[in.slot].fd;
	if (ioctl(fd, KVM_GET_MP_STATE, &state)) {
		put(-1, 0);
		return;
	}
	if (state.mp_state != KVM_MP_STATE_RUNNABLE) {
		state.mp_state = KVM_MP_STATE_RUNNABLE;
		if (ioctl(fd, KVM_SET_MP_STATE, &state)) {
			put(-1, 0);
			return;
		}
	}
	if (ioctl(fd, KVM_SET_REGS, &in.regs)) {
		put(-1, 0);
		return;
	}
	tick = between_ticks();
	alarm_every(in.ns);
	due = now() + in.ns;
	for (;;) {
		int result = ioctl(fd, KVM_RUN, 0);

		if (result && errno == EINTR && now() < due)
			continue;
		if (result) {
			out.late = errno == EINTR;
			out.result = -errno;
			break;
		}
		out.exit_reason = run->exit_reason;
		if (run->exit_reason == KVM_EXIT_IO || out.exits == EXITS)
			break;
		exits[out.exits].reason = run->exit_reason;
		if (run->exit_reason == KVM_EXIT_HYPERV) {
			exits[out.exits].type = run->hyperv.type;
			if (run->hyperv.type == KVM_EXIT_HYPERV_SYNIC) {
				exits[out.exits].words[0] = run->hyperv.u.synic.msr;
				exits[out.exits].words[1] = run->hyperv.u.synic.control;
				exits[out.exits].words[2] = run->hyperv.u.synic.evt_page;
				exits[out.exits].words[3] = run->hyperv.u.synic.msg_page;
			} else {
				exits[out.exits].words[0] = run->hyperv.u.hcall.input;
				exits[out.exits].words[2] = run->hyperv.u.hcall.params[0];
				exits[out.exits].words[3] = run->hyperv.u.hcall.params[1];
				run->hyperv.u.hcall.result = in.answer;
			}
		} else if (run->exit_reason == KVM_EXIT_SYSTEM_EVENT) {
			exits[out.exits].type = run->system_event.type;
		} else if (run->exit_reason == KVM_EXIT_X86_RDMSR || run->exit_reason == KVM_EXIT_X86_WRMSR) {
			exits[out.exits].type = run->msr.reason;
			exits[out.exits].words[0] = run->msr.index;
			exits[out.exits].words[1] = run->exit_reason == KVM_EXIT_X86_WRMSR ? run->msr.data : 0;
			run->msr.error = in.answer & 1;
			run->msr.data = in.answer;
		} else if (run->exit_reason == KVM_EXIT_IOAPIC_EOI) {
			exits[out.exits].words[0] = run->eoi.vector;
		} else if (run->exit_reason == KVM_EXIT_MMIO) {
			exits[out.exits].words[0] = run->mmio.phys_addr;
			exits[out.exits].type = run->mmio.is_write;
			memset(run->mmio.data, 0, sizeof run->mmio.data);
		} else {
			break;
		}
		out.exits++;
	}
	out.ticked = (now() - tick_phase) / tick_ns != tick;
	alarm_every(0);
	if (run->exit_reason == KVM_EXIT_IO)
		out.port = run->io.port;
	if (ioctl(fd, KVM_GET_REGS, &out.regs)) {
		put(-1, 0);
		return;
	}
	bytes = room(sizeof out + sizeof exits);
	if (!bytes) {
		put_error(ENOSPC);
		return;
	}
	memcpy(bytes, &out, sizeof out);
	memcpy(bytes + sizeof out, exits, out.exits * sizeof *exits);
	put(0, sizeof out + out.exits * sizeof *exits);
}

/* A TSC deadline so many ticks ahead of the guest's own TSC. */
static void do_deadline(const uint8_t *payload)
{
	struct { uint32_t fd, unused; uint64_t ticks; } in;
	struct { struct kvm_msrs head; struct kvm_msr_entry entry; } one = { { 1, 0 }, { 0x10, 0, 0 } };

	memcpy(&in, payload, sizeof in);
	if (ioctl(in.fd, KVM_GET_MSRS, &one) != 1) {
		put_error(EINVAL);
		return;
	}
	one.entry.index = 0x6e0;
	one.entry.data += in.ticks;
	put(ioctl(in.fd, KVM_SET_MSRS, &one), 0);
}

static void do_answer(const uint8_t *payload)
{
	struct { uint32_t slot, error; uint64_t data; } in;

	memcpy(&in, payload, sizeof in);
	guests[in.slot].run->msr.error = in.error;
	guests[in.slot].run->msr.data = in.data;
	put(0, 0);
}

/* ------------------------------------------------------------------------------------------------------- looking */

struct seen {
	struct kvm_lapic_state page;
	struct kvm_vcpu_events events;
	struct kvm_mp_state state;
	uint32_t refused; /* the error number of a KVM_GET_LAPIC that the kernel refused: an id that a page gave */
	struct kvm_sregs sregs;
};

static struct watched { int fd; struct seen seen; uint64_t msrs[MSRS]; } *watched[SLOTS];

static void do_watch(uint32_t slot, int fd)
{
	if (slot >= SLOTS) {
		put_error(ENOSPC);
		return;
	}
	if (fd < 0) {
		free(watched[slot]);
		watched[slot] = NULL;
	} else {
		watched[slot] = calloc(1, sizeof *watched[slot]);
		watched[slot]->fd = fd;
	}
	put(0, 0);
}

/* Pages, events and what else is asked for, of vCPUs one by one: dwords that are not what they were at the last look. */
static void do_look(uint32_t count, const uint32_t *slots, int flags)
{
	uint32_t *out, *start;
	size_t whole = sizeof(struct seen) / 4;

	start = out = (uint32_t *)room(count * (8 * whole + 8));
	if (!start) {
		put_error(ENOSPC);
		return;
	}
	for (uint32_t n = 0; n < count; n++) {
		struct watched *one = slots[n] < SLOTS ? watched[slots[n]] : NULL;
		struct seen now;
		uint32_t *head = out++, changed = 0, *old = (uint32_t *)&one->seen, *new = (uint32_t *)&now;

		if (!one) {
			put_error(ENOENT);
			return;
		}
		now = one->seen;
		now.refused = ioctl(one->fd, KVM_GET_LAPIC, &now.page) ? errno : 0;
		if (now.refused)
			now.page = one->seen.page;
		if (ioctl(one->fd, KVM_GET_VCPU_EVENTS, &now.events) ||
		    ((flags & LOOK_STATES) && ioctl(one->fd, KVM_GET_MP_STATE, &now.state)) ||
		    ((flags & LOOK_SREGS) && ioctl(one->fd, KVM_GET_SREGS, &now.sregs))) {
			put(-1, 0);
			return;
		}
		for (uint32_t at = 0; at < whole; at++)
			if (old[at] != new[at]) {
				*out++ = at;
				*out++ = old[at] = new[at];
				changed++;
			}
		*head = changed;
	}
	put(0, (uint8_t *)out - (uint8_t *)start);
}

typedef uint32_t __attribute__((may_alias)) dword;

static dword *differing(dword *out, void *kept, const void *seen, size_t count)
{
	dword *head = out++, *old = kept;
	const dword *new = seen;

	*head = 0;
	for (size_t at = 0; at < count; at++)
		if (old[at] != new[at]) {
			*out++ = at;
			*out++ = old[at] = new[at];
			++*head;
		}
	return out;
}

/* The same for memory, of which most is as it was. */
static dword *differing_pages(dword *out, void *kept, const void *seen, size_t count)
{
	enum { PAGE_DWORDS = 1024 };
	dword *head = out++, *old = kept;
	const dword *new = seen;

	*head = 0;
	for (size_t from = 0; from < count; from += PAGE_DWORDS) {
		size_t to = from + PAGE_DWORDS < count ? from + PAGE_DWORDS : count;

		if (!memcmp(old + from, new + from, (to - from) * 4))
			continue;
		for (size_t at = from; at < to; at++)
			if (old[at] != new[at]) {
				*out++ = at;
				*out++ = old[at] = new[at];
				++*head;
			}
	}
	return out;
}

/* As do_look with states, then MSRs of each vCPU, then a part of the guest's memory: each what is not as it was, or,
 * ``anew``, what is not 0. */
static void do_survey(const uint32_t *words, int anew)
{
	struct { uint32_t memory, from, bytes, vcpus, msrs; } in;
	struct { struct kvm_msrs head; struct kvm_msr_entry entries[MSRS]; } asked = { 0 };
	const uint32_t *slots, *indices;
	uint64_t values[MSRS] = { 0 };
	dword *out, *start;

	memcpy(&in, words, sizeof in);
	slots = words + sizeof in / 4;
	indices = slots + in.vcpus;
	start = out = (dword *)room(in.vcpus * (8 * sizeof(struct seen) / 4 + 16 * MSRS + 16) + 2 * in.bytes + 8);
	if (!start || in.msrs > MSRS || in.memory >= SLOTS || !memories[in.memory]) {
		put_error(ENOSPC);
		return;
	}
	for (uint32_t n = 0; n < in.vcpus; n++) {
		struct watched *one = slots[n] < SLOTS ? watched[slots[n]] : NULL;
		struct seen now;

		if (!one) {
			put_error(ENOENT);
			return;
		}
		if (anew) {
			memset(&one->seen, 0, sizeof one->seen);
			memset(one->msrs, 0, sizeof one->msrs);
		}
		now = one->seen;
		if (ioctl(one->fd, KVM_GET_LAPIC, &now.page) || ioctl(one->fd, KVM_GET_VCPU_EVENTS, &now.events) ||
		    ioctl(one->fd, KVM_GET_MP_STATE, &now.state)) {
			put(-1, 0);
			return;
		}
		out = differing(out, &one->seen, &now, sizeof now / 4);
		asked.head.nmsrs = in.msrs;
		for (uint32_t i = 0; i < in.msrs; i++)
			asked.entries[i] = (struct kvm_msr_entry){ indices[i], 0, 0 };
		*out++ = ioctl(one->fd, KVM_GET_MSRS, &asked);
		for (uint32_t i = 0; i < in.msrs; i++)
			values[i] = asked.entries[i].data;
		out = differing(out, one->msrs, values, 2 * in.msrs);
	}
	if (anew) {
		free(surveyed[in.memory]);
		surveyed[in.memory] = NULL;
	}
	if (!surveyed[in.memory])
		surveyed[in.memory] = calloc(1, in.bytes);
	out = differing_pages(out, surveyed[in.memory], memories[in.memory] + in.from, in.bytes / 4);
	put(0, (uint8_t *)out - (uint8_t *)start);
}

/* ---------------------------------------------------------------------------------------- a guest that lives by itself */

enum { MOST_VCPUS = 8, PORT_OVER = 0x10, PORT_FAILED = 0x12, PORT_MESSAGE = 0x14, MESSAGE_SINT = 2, MESSAGE_BYTES = 256 };

static struct {
	uint8_t *memory;
	int vm, over, reason, pipe[2];
	uint32_t bytes, port, value;
	uint64_t message_page[MOST_VCPUS];
	struct { pthread_t thread; struct kvm_run *run; int fd, index; } vcpus[MOST_VCPUS];
	pthread_mutex_t lock;
	pthread_cond_t ended;
} life = { .lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER };

static void end_life(int reason, uint32_t port, uint32_t value)
{
	pthread_mutex_lock(&life.lock);
	if (!life.over) {
		life.reason = reason;
		life.port = port;
		life.value = value;
	}
	__atomic_store_n(&life.over, 1, __ATOMIC_SEQ_CST);
	pthread_cond_broadcast(&life.ended);
	pthread_mutex_unlock(&life.lock);
}

/* One vCPU's thread, as a VMM has it. */
static void *live_vcpu(void *argument)
{
	int i = (intptr_t)argument;
	struct kvm_run *run = life.vcpus[i].run;
	char name[16];

	snprintf(name, sizeof name, "CPU %d/KVM", i);
	prctl(PR_SET_NAME, name);
	while (!__atomic_load_n(&life.over, __ATOMIC_SEQ_CST)) {
		if (ioctl(life.vcpus[i].fd, KVM_RUN, 0)) {
			if (errno != EINTR && errno != EAGAIN)
				end_life(-errno, 0, i);
			continue;
		}
		if (run->exit_reason == KVM_EXIT_HYPERV && run->hyperv.type == KVM_EXIT_HYPERV_SYNIC) {
			life.message_page[i] = run->hyperv.u.synic.msg_page;
		} else if (run->exit_reason == KVM_EXIT_IO && run->io.port == PORT_MESSAGE) {
			uint8_t target = *((uint8_t *)run + run->io.data_offset);

			if (write(life.pipe[1], &target, 1) != 1)
				end_life(-errno, 0, i);
		} else {
			uint32_t value = run->exit_reason == KVM_EXIT_IO ? *(uint32_t *)((uint8_t *)run + run->io.data_offset) : (uint32_t)i;

			end_life(run->exit_reason, run->exit_reason == KVM_EXIT_IO ? run->io.port : 0, value);
		}
	}
	return NULL;
}

/* The VMM's own messages: into the slot, when it is free, and the SINT's line is raised. */
static void *live_device(void *unused)
{
	uint8_t target;

	(void)unused;
	prctl(PR_SET_NAME, "device");
	while (read(life.pipe[0], &target, 1) == 1 && target < MOST_VCPUS) {
		uint64_t page = life.message_page[target];
		uint8_t *slot = life.memory + (page & ~0xfffull) + MESSAGE_SINT * MESSAGE_BYTES;
		struct kvm_irq_level line = { .irq = target, .level = 1 };

		if (!(page & 1) || (page & ~0xfffull) + 4096 > life.bytes) {
			end_life(-EFAULT, PORT_MESSAGE, target);
			break;
		}
		while (__atomic_load_n((uint32_t *)slot, __ATOMIC_SEQ_CST) && !__atomic_load_n(&life.over, __ATOMIC_SEQ_CST)) {
			__atomic_or_fetch(slot + 5, 1, __ATOMIC_SEQ_CST);
			usleep(200);
		}
		slot[4] = 16;
		slot[5] = 0;
		__atomic_store_n((uint32_t *)slot, 1, __ATOMIC_SEQ_CST);
		if (ioctl(life.vm, KVM_IRQ_LINE_STATUS, &line) || line.status < 1)
			end_life(-EIO, PORT_MESSAGE, target);
	}
	return NULL;
}

/* Runs all vCPUs of a guest, each in a thread of its own, until one of them says that it is over; then a part of the
 * guest's memory. */
static void do_live(const uint8_t *payload)
{
	struct { uint32_t vm, memory, at, bytes; uint64_t ns; uint32_t count, slots[MOST_VCPUS]; } in;
	struct { int32_t reason; uint32_t port, value, late; } out = { 0 };
	pthread_t device;
	struct timespec until;
	uint8_t *bytes, last = MOST_VCPUS;

	memcpy(&in, payload, sizeof in);
	bytes = room(sizeof out + in.bytes);
	if (!bytes || in.count > MOST_VCPUS || in.memory >= SLOTS || in.at + in.bytes > memory_bytes[in.memory] || pipe(life.pipe)) {
		put_error(EINVAL);
		return;
	}
	life.vm = in.vm;
	life.memory = memories[in.memory];
	life.bytes = memory_bytes[in.memory];
	life.over = 0;
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += in.ns / 1000000000;
	pthread_mutex_lock(&life.lock);
	pthread_create(&device, NULL, live_device, NULL);
	for (uint32_t i = 0; i < in.count; i++) {
		life.vcpus[i].run = guests[in.slots[i]].run;
		life.vcpus[i].fd = guests[in.slots[i]].fd;
		life.vcpus[i].run->immediate_exit = 0;
		pthread_create(&life.vcpus[i].thread, NULL, live_vcpu, (void *)(intptr_t)i);
	}
	while (!life.over)
		if (pthread_cond_timedwait(&life.ended, &life.lock, &until) == ETIMEDOUT) {
			out.late = 1;
			life.over = 1;
		}
	pthread_mutex_unlock(&life.lock);
	for (uint32_t i = 0; i < in.count; i++) {
		life.vcpus[i].run->immediate_exit = 1;
		pthread_kill(life.vcpus[i].thread, SIGALRM);
		pthread_join(life.vcpus[i].thread, NULL);
	}
	if (write(life.pipe[1], &last, 1) == 1)
		pthread_join(device, NULL);
	close(life.pipe[0]);
	close(life.pipe[1]);
	out.reason = life.reason;
	out.port = life.port;
	out.value = life.value;
	memcpy(bytes, &out, sizeof out);
	memcpy(bytes + sizeof out, life.memory + in.at, in.bytes);
	put(0, sizeof out + in.bytes);
}

/* ---------------------------------------------------------------------------------------------------------- batch */

static void carry_out(const struct record *record)
{
	const uint8_t *payload = (const uint8_t *)(record + 1);
	const uint32_t *words = (const uint32_t *)payload;

	switch (record->op) {
	case OPEN:
		put(open((const char *)(words + 1), words[0] | O_CLOEXEC), 0);
		break;
	case CLOSE:
		put(close(words[0]), 0);
		break;
	case IOCTL:
		do_ioctl(payload);
		break;
	case READ:
		do_read(words[0], words[1]);
		break;
	case WRITE:
		put(write(words[0], words + 2, words[1]), 0);
		break;
	case MEMORY:
		do_memory(words[0], words[1], record->bytes > 8 ? words[2] : MEMORY_BYTES);
		break;
	case STORE:
		if (words[0] >= SLOTS || !memories[words[0]] || words[1] + words[2] > memory_bytes[words[0]]) {
			put_error(EFAULT);
			break;
		}
		memcpy(memories[words[0]] + words[1], words + 4, words[2]);
		put(0, 0);
		break;
	case GUEST:
		do_guest(words[0], words[1], words[2]);
		break;
	case FREE:
		do_free(words[0], words[1]);
		break;
	case EXECUTE:
		do_execute(payload, record->flags & SET_REGS);
		break;
	case ANSWER:
		do_answer(payload);
		break;
	case WATCH:
		do_watch(words[0], (int)words[1]);
		break;
	case LOOK:
		do_look(words[0], words + 1, record->flags);
		break;
	case CLOCK: {
		int64_t ns = now(), *out = (int64_t *)room(sizeof ns);

		*out = ns;
		put(0, sizeof ns);
		break;
	}
	case SLEEP: {
		uint64_t ns = record->bytes < 8 ? words[0] : *(const uint64_t *)payload;
		struct timespec rest = { ns / 1000000000, ns % 1000000000 };

		nanosleep(&rest, NULL);
		put(0, 0);
		break;
	}
	case DEADLINE:
		do_deadline(payload);
		break;
	case PROGRAM:
		do_program(payload);
		break;
	case SURVEY:
		do_survey(words, record->flags & ANEW);
		break;
	case LIVE:
		do_live(payload);
		break;
	case QUIT:
		reboot(RB_POWER_OFF);
		break;
	default:
		put_error(ENOSYS);
	}
}

static void serve(void)
{
	uint32_t last = header->asked, waited = 0;
	char byte;

	header->ready = READY;
	for (;;) {
		if (header->asked == last) {
			if (waited++ < header->spins)
				continue;
			header->sleeping = 1;
			__sync_synchronize();
			if (header->asked == last && read(bell, &byte, 1) < 0 && errno != EINTR)
				fail("/dev/ttyS1");
			header->sleeping = 0;
			waited = 0;
			continue;
		}
		waited = 0;
		last = header->asked;
		__sync_synchronize();
		answer_at = answers;
		for (const uint8_t *at = requests, *end = requests + header->request_bytes; at < end;) {
			const struct record *record = (const struct record *)at;

			carry_out(record);
			at += sizeof *record + ((record->bytes + 7) & ~7u);
		}
		header->answer_bytes = answer_at - answers;
		__sync_synchronize();
		header->done = last;
	}
}

int main(void)
{
	struct sigaction action = { .sa_handler = ignored };

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/dev", 0755);
	mkdir("/tracing", 0755);
	mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sysfs", "/sys", "sysfs", 0, NULL);
	mount("tracefs", "/tracing", "tracefs", 0, NULL);
	load_modules();
	sigaction(SIGALRM, &action, NULL);
	open_bell();
	map_shared_memory();
	find_ticks();
	serve();
}
