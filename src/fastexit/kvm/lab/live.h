/* A guest that lives by itself: each vCPU and the VMM's device in a thread of its own, for init.c. */

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
